"""Distribution matching's other half: how well the critic keeps up with the generator, and tells it from data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from ddil_dist.report.charts import Chart, figure, line, x_label
from ddil_dist.report.html import Html, el, lead, percent, plural, section
from ddil_dist.report.learning import MAX_WINDOW, lines_chart
from ddil_dist.report.record import RunRecord
from ddil_dist.report.series import Floats, Lines, column, moving_average, thinned

CRITIC = "fake_score"
"""The role's name in the journal."""
LEAST_PAIRS = 10
"""Under so many turns of the generator the lag is noise."""


def has_critic(run: RunRecord) -> bool:
    """Whether a critic was trained."""
    return bool(np.isfinite(column(run.updates, "losses", CRITIC)).any())


def critic_section(run: RunRecord) -> Html:
    """The critic's loss and accuracy, the generator's gradient, and the critic's lag in a sentence."""
    updates = run.updates
    x = column(updates, "update")
    window = int(np.clip(len(updates) // 25, 1, MAX_WINDOW))

    def of(name: str) -> Floats:
        return column(updates, "metrics", name)

    charts = [
        *lines_chart("The critic's loss", "denoising what the generator makes", x,
                     [("denoising", "accent", of(f"{CRITIC}/denoising"))], window),
        *lines_chart("The generator's gradient", "mean magnitude, of critic against teacher", x,
                     [("gradient", "student", of("student/gradient"))], window),
        *lines_chart("Generator against discriminator", "their losses on each other", x,
                     [("generator", "student", of("student/gan")), ("discriminator", "accent", of(f"{CRITIC}/gan"))],
                     window),
        *_accuracy_chart(x, of(f"{CRITIC}/accuracy"), window),
    ]  # fmt: skip
    drawn = [el("div", *[figure(chart) for chart in charts], class_="grid")] if charts else []
    return section("critic", "The critic", _lag_sentence(critic_lag(updates)), *drawn)


@dataclass(frozen=True)
class CriticLag:
    """By how much the critic is worse at what a generator makes that has just moved.

    lag    its loss in the first update after a turn of the generator, over that in the last before the next turn, less
           1: the mean over turns.
    error  standard error of that mean.
    """

    lag: float
    error: float
    num_turns: int


def critic_lag(updates: Lines) -> CriticLag | None:
    """From the later half of a run; None where the generator moves in every update, or has had too few turns.

    In the update of its turn the critic, where it has one, still learns from what the generator made before it moved.
    """
    later = updates[len(updates) // 2 :]
    losses = column(later, "metrics", f"{CRITIC}/denoising")
    turns = np.flatnonzero(np.isfinite(column(later, "losses", "student")))
    between = [losses[first + 1 : last + 1] for first, last in itertools.pairwise(turns)]
    known = [found for each in between if len(found := each[np.isfinite(each) & (each > 0)]) > 1]
    if len(known) < LEAST_PAIRS:
        return None
    logs = np.array([np.log(each[0] / each[-1]) for each in known])  # ratios of noisy losses have long tails
    error = float(logs.std(ddof=1) / len(logs) ** 0.5)
    return CriticLag(float(np.expm1(logs.mean())), error, len(known))


def _lag_sentence(found: CriticLag | None) -> Html:
    if found is None:
        return lead("The critic learned beside the generator.")
    if abs(found.lag) < 2 * found.error:
        return lead(
            "Right after the generator moved, the critic was ",
            el("b", "no worse"),
            f" at its samples than right before its next move (a difference of {percent(abs(found.lag))}, noise of "
            f"{percent(found.error)}, over {plural(found.num_turns, 'move')}).",
        )
    return lead(
        "Right after the generator moved, the critic's loss was ",
        el("b", f"{percent(abs(found.lag))} {'higher' if found.lag > 0 else 'lower'}"),
        f" than right before its next move (± {percent(found.error)}, over {plural(found.num_turns, 'move')}).",
    )


def _accuracy_chart(x: Floats, accuracy: Floats, window: int) -> list[Chart]:
    if not np.isfinite(accuracy).any():
        return []

    def draw(axes: Axes) -> None:
        line(axes, *thinned(x, moving_average(accuracy, window)), "accent")
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        x_label(axes, "update")

    note = "of the discriminator; at 50% it cannot tell"
    return [Chart("Told from data", draw, note, [("accuracy", "accent")], wide=False, height=250)]
