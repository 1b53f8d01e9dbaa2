"""What the learner learned from: loss, the proof of imitation, the sampling prior, staleness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from ddil_dist.report.charts import (
    COLOURS,
    SOURCE_COLOURS,
    SOURCE_LABELS,
    Chart,
    figure,
    heat_map,
    line,
    stacked_sources,
    x_label,
)
from ddil_dist.report.html import Colour, Html, el, lead, missing, percent, plural, section
from ddil_dist.report.record import RunRecord
from ddil_dist.report.series import (
    SOURCES,
    Floats,
    Shares,
    VersionMap,
    column,
    moving_average,
    shares,
    thinned,
    version_map,
)

LINE_COLOURS: tuple[Colour, ...] = ("ink", "plum", "teacher", "accent", "gold", "forward")
"""Of lines that stand for no source, in turn."""
MAX_WINDOW = 200
"""Updates that a smoothed line averages at most; wider ones would flatten the beginning of a long run."""
FEW_UPDATES = 8
"""Under so many a heat map has nothing to show yet."""


def loss_section(run: RunRecord) -> Html:
    """Loss over updates, by source and by timestep, with gradient norm and learning rate."""
    updates = run.updates
    if not updates:
        return section("loss", "Loss", missing("No update lines in the journal yet: the training has not begun."))
    x, losses = column(updates, "update"), column(updates, "loss")
    window = int(np.clip(len(updates) // 25, 1, MAX_WINDOW))
    charts = [_loss_chart(x, losses, window)]
    by_source = {name: column(updates, "loss_by_source", name) for name in SOURCES}
    named = [(SOURCE_LABELS[name], SOURCE_COLOURS[name], values) for name, values in by_source.items()]
    charts += lines_chart("Loss by source", "who made the state", x, named, window)
    steps = sorted({key for entry in updates for key in entry.get("loss_by_timestep") or {}}, key=_as_int, reverse=True)
    by_step = [
        (f"t = {step}", LINE_COLOURS[index], column(updates, "loss_by_timestep", step))
        for index, step in enumerate(steps[: len(LINE_COLOURS)])
    ]
    charts += lines_chart("Loss by timestep", "of the student's grid, noisiest first", x, by_step, window)
    charts += _gradient_charts(run, x)
    begin, end = moving_average(losses, window)[[0, -1]]
    sentence = lead(
        "Smoothed over ",
        el("b", plural(window, "update")),
        f", the loss went from {begin:.3g} to ",
        el("b", f"{end:.3g}"),
        ".",
    )
    return section("loss", "Loss", sentence, el("div", *[figure(chart) for chart in charts], class_="grid"))


def _as_int(text: str) -> int:
    return int(text) if text.lstrip("-").isdigit() else 0


def _loss_chart(x: Floats, losses: Floats, window: int) -> Chart:
    def draw(axes: Axes) -> None:
        line(axes, *thinned(x, losses), "forward", linewidth=1)
        line(axes, *thinned(x, moving_average(losses, window)), "accent")
        _scale(axes, [losses])
        x_label(axes, "update")

    keys = [("each update", "forward"), ("smoothed", "accent")]
    return Chart("Training loss", draw, "over the states of each update", keys)


def lines_chart(
    title: str, note: str, x: Floats, lines: Sequence[tuple[str, Colour, Floats]], window: int
) -> list[Chart]:
    """Smoothed lines over half the page, those with any value; no chart if none has."""
    known = [(label, colour, values) for label, colour, values in lines if np.isfinite(values).any()]
    if not known:
        return []

    def draw(axes: Axes) -> None:
        for _, colour, values in known:
            smooth = moving_average(values, window)
            line(axes, *thinned(x, np.where(np.isfinite(values), smooth, np.nan)), colour, linewidth=1.8)
        _scale(axes, [moving_average(values, window) for _, _, values in known])
        x_label(axes, "update")

    return [Chart(title, draw, note, [(label, colour) for label, colour, _ in known], wide=False, height=250)]


def _gradient_charts(run: RunRecord, x: Floats) -> list[Chart]:
    norms, rates = column(run.updates, "grad_norm"), column(run.updates, "learning_rate")
    limit = run.config.learner.optimizer.max_grad_norm if run.config is not None else None
    charts = []
    if np.isfinite(norms).any():

        def draw_norms(axes: Axes) -> None:
            line(axes, *thinned(x, norms), "teacher", linewidth=1.3)
            if limit is not None:
                axes.axhline(limit, color=COLOURS["warn"], linewidth=1.3, linestyle=(0, (4, 3)))
            axes.set_ylim(bottom=0)
            x_label(axes, "update")

        keys: list[tuple[str, Colour]] = [("norm", "teacher")]
        keys += [(f"clipped above {limit:g}", "warn dashed")] if limit is not None else []
        charts.append(Chart("Gradient norm", draw_norms, "before clipping", keys, wide=False, height=250))
    if np.isfinite(rates).any():

        def draw_rates(axes: Axes) -> None:
            line(axes, *thinned(x, rates), "accent")
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="plain")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
            x_label(axes, "update")

        charts.append(
            Chart("Learning rate", draw_rates, "of the student", [("rate", "accent")], wide=False, height=250)
        )
    return charts


def _scale(axes: Axes, values: Sequence[Floats]) -> None:
    """A logarithmic axis where positive values span more than a decade, else one from 0."""
    known = np.concatenate([each[np.isfinite(each)] for each in values])
    if len(known) and known.min() > 0 and np.quantile(known, 0.99) > 10 * np.quantile(known, 0.01):
        axes.set_yscale("log")
        axes.text(0, 1.01, "log scale", transform=axes.transAxes, color=COLOURS["muted"], fontsize=10, va="bottom")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.minorticks_off()
    elif len(known) and known.min() >= 0:
        axes.set_ylim(bottom=0)


def imitation_section(run: RunRecord) -> Html:
    """Whose states the student was trained on: policy versions, sources against the prior, staleness."""
    title = "Did the student learn from its own states?"
    updates = run.updates
    if not updates:
        return section("imitation", title, missing("No update lines in the journal yet."))
    found = version_map(updates)
    charts = [*_prior_charts(run), *_staleness_charts(run)]
    if found is None:
        sentence = missing("No state that training drew was made by a student: this run was plain distillation so far.")
    else:
        title = "The student learned from its own states" if found.trained_share > 0 else title
        sentence = lead(
            el("b", percent(found.student_share)),
            " of the states that training drew were reached through the student's own transitions, made by ",
            el("b", plural(found.num_versions, "policy version")),
            "; of these states, ",
            el("b", percent(found.trained_share)),
            " came from a student that training had already changed. "
            f"Their policy was {found.mean_lag:.0f} updates old on average.",
        )
        if len(updates) >= FEW_UPDATES:
            charts.insert(0, _version_chart(found))
    return section("imitation", title, sentence, el("div", *[figure(chart) for chart in charts], class_="grid"))


def _version_chart(found: VersionMap) -> Chart:
    def draw(axes: Axes) -> None:
        heat_map(axes, found)
        x_label(axes, "update")

    keys: list[tuple[str, Colour]] = [
        ("share of an update's states", "student"),
        ("the student being trained", "ink dashed"),
    ]
    return Chart("Policy version", draw, "that made the states of each update; stronger is more", keys, height=340)


def _prior_charts(run: RunRecord) -> list[Chart]:
    """Sources of the drawn states as stacked areas, with the prior's wanted shares as dashed lines."""
    updates, config = run.updates, run.config
    x = column(updates, "update")
    drawn = shares(updates, "sources", x, SOURCES)
    if not drawn.values.any():
        return []

    def draw(axes: Axes) -> None:
        stacked_sources(axes, drawn)
        if config is not None:
            wanted = [config.prior.at(float(update - 1) / config.learner.updates) for update in drawn.x]
            led = 1 - _noise_share(drawn)
            for edge in ([p.forward for p in wanted], [p.forward + p.student * led for p in wanted]):
                line(axes, drawn.x, edge, "ink", linewidth=1.5, linestyle=(0, (4, 3)), drawstyle="steps-mid")
        x_label(axes, "update")

    keys: list[tuple[str, Colour]] = [(SOURCE_LABELS[name], SOURCE_COLOURS[name]) for name in SOURCES]
    keys += [("wanted by the prior", "ink dashed")] if config is not None else []
    return [Chart("Sources of the states drawn", draw, "share of each update", keys, wide=False, height=250)]


def _noise_share(drawn: Shares) -> float:
    """Of rollouts' states, those where they begin, to which no policy led."""
    whole = drawn.values.sum(axis=1)
    of = dict(zip(drawn.names, whole, strict=True))
    rollouts = of["STUDENT"] + of["TEACHER"] + of["NOISE"]
    return float(of["NOISE"] / rollouts) if rollouts else 0.0


def _staleness_charts(run: RunRecord) -> list[Chart]:
    x = column(run.updates, "update")
    mean, most = column(run.updates, "staleness_mean"), column(run.updates, "staleness_max")
    if not np.isfinite(mean).any():
        return []
    bound = run.config.replay.max_staleness if run.config is not None else None

    def draw(axes: Axes) -> None:
        line(axes, *thinned(x, most), "forward", linewidth=1.5)
        line(axes, *thinned(x, mean), "student")
        if bound is not None:
            axes.axhline(bound, color=COLOURS["warn"], linewidth=1.3, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
        x_label(axes, "update")

    keys: list[tuple[str, Colour]] = [("mean", "student"), ("oldest", "forward")]
    keys += [(f"bound, {bound}", "warn dashed")] if bound is not None else []
    note = "updates since the policy that made a state"
    return [Chart("Staleness", draw, note, keys, wide=False, height=250)]
