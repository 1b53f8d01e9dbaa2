"""Covariate shift: the verdict, the errors behind it, and shared trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from ddil_dist.analysis.results import Analysis
from ddil_dist.analysis.verdict import verdict
from ddil_dist.metrics.intervals import Interval
from ddil_dist.metrics.protocol import METRICS
from ddil_dist.report.charts import COLOURS, Chart, figure, x_label
from ddil_dist.report.html import Colour, Html, el, lead, missing, section, table
from ddil_dist.report.record import RunRecord

ORIGINS: tuple[tuple[str, Colour], ...] = (
    ("forward-diffused", "forward"),
    ("the teacher's", "teacher"),
    ("reached by the student", "student"),
)


def shift_section(run: RunRecord) -> Html:
    """The verdict first, then what it is made of; the command, where the run was not analysed."""
    analysis = run.analysis
    if analysis is None:
        command = f"python -m ddil_dist.analyze {run.directory}"
        return section("shift", "Covariate shift", missing(f"Not measured. For a finished run: {command}"))
    points = analysis.shift.points
    found = verdict(analysis.shift, num_states=int(analysis.protocol["num_states"]))
    timesteps = [point.timestep for point in points]
    errors = [
        [point.error_forward for point in points],
        [point.error_teacher for point in points],
        [point.error_visited for point in points],
    ]
    distances = [
        [point.distance_floor for point in points],
        [point.distance_teacher for point in points],
        [point.distance_visited for point in points],
    ]
    charts = [
        _intervals_chart(
            "One-step error", f"against the teacher, {analysis.protocol['error']}, by whose states", timesteps, errors
        ),
        _ratio_chart(timesteps, [point.ratio for point in points]),
        _distance_chart(timesteps, distances),
        _final_chart(timesteps, [point.final_error for point in points]),
    ]
    return section(
        "shift",
        "Covariate shift",
        lead(el("b", found.headline), " ", " ".join(found.sentences[1:])),
        el("div", *[figure(chart) for chart in charts], class_="grid"),
        *_mixtures(analysis),
    )


def _intervals_chart(title: str, note: str, timesteps: Sequence[int], rows: Sequence[Sequence[Interval]]) -> Chart:
    def draw(axes: Axes) -> None:
        for row, (_, colour), offset in zip(rows, ORIGINS, (-0.12, 0.0, 0.12), strict=True):
            _points(axes, row, colour, offset)
        axes.set_yscale("log")
        _timesteps(axes, timesteps)

    return Chart(title, draw, f"{note}; log scale", ORIGINS, wide=False, height=260)


def _ratio_chart(timesteps: Sequence[int], ratios: Sequence[Interval]) -> Chart:
    def draw(axes: Axes) -> None:
        axes.axhline(1, color=COLOURS["ink"], linewidth=1.2, linestyle=(0, (4, 3)))
        _points(axes, ratios, "student", 0)
        _timesteps(axes, timesteps)

    note = "error at reached states over error at forward-diffused ones; above 1 there is shift"
    return Chart("Ratio", draw, note, [("95% interval", "student")], wide=False, height=260)


def _distance_chart(timesteps: Sequence[int], rows: Sequence[Sequence[float]]) -> Chart:
    def draw(axes: Axes) -> None:
        for row, (_, colour), offset in zip(rows, ORIGINS, (-0.25, 0.0, 0.25), strict=True):
            axes.bar(np.arange(len(row)) + offset, row, width=0.23, color=COLOURS[colour])
        _timesteps(axes, timesteps)

    keys = [("other forward-diffused (the floor)", ORIGINS[0][1]), *ORIGINS[1:]]
    return Chart("Distance from forward-diffused states", draw, "squared discrepancy of the teacher's features",
                 keys, wide=False, height=260)  # fmt: skip


def _final_chart(timesteps: Sequence[int], errors: Sequence[Interval]) -> Chart:
    def draw(axes: Axes) -> None:
        _points(axes, errors, "accent", 0)
        axes.set_ylim(bottom=0)
        _timesteps(axes, timesteps)

    note = "where the teacher brings the state to t and the student goes on"
    return Chart("Final error", draw, note, [("95% interval", "accent")], wide=False, height=260)


def _points(axes: Axes, row: Sequence[Interval], colour: Colour, offset: float) -> None:
    values = np.array([each.value for each in row])
    spread = np.array([[each.value - each.low for each in row], [each.high - each.value for each in row]])
    x = np.arange(len(row)) + offset
    error = np.maximum(spread, 0)
    axes.errorbar(x, values, yerr=error, fmt="o", markersize=6, elinewidth=2, color=COLOURS[colour])


def _timesteps(axes: Axes, timesteps: Sequence[int]) -> None:
    axes.set_xticks(range(len(timesteps)), [str(t) for t in timesteps])
    axes.set_xlim(-0.5, len(timesteps) - 0.5)
    x_label(axes, "timestep, noisiest first")


def _mixtures(analysis: Analysis) -> list[Html]:
    if not analysis.mixtures:
        return []
    known = {key for mixture in analysis.mixtures for key in mixture.metrics}
    metrics = [metric for metric in METRICS if metric.key in known]
    head = ["transitions by", *(f"{metric.label} {metric.arrow}" for metric in metrics)]
    rows = [
        [mixture.name, *(metric.show(mixture.metrics.get(metric.key)) for metric in metrics)]
        for mixture in analysis.mixtures
    ]
    words = (
        f"Trajectories that both share, {analysis.protocol['num_images']} each, from the same noise and prompts: the "
        "teacher with some probability at every transition, or one of them until a timestep and the other from there."
    )
    return [el("h3", "Who begins, and who must end"), el("p", words), table(head, rows)]
