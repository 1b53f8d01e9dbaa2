"""What was inserted and never sampled: whose states, at which timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from ddil_dist.replay.unused import most_starved, starved_share
from ddil_dist.report.charts import COLOURS, Chart
from ddil_dist.report.html import Html, count, el, percent
from ddil_dist.report.record import Line

LEAST_NOTABLE = 0.01
MOST_TICKS = 12


def starved_sentence(last: Line) -> list[Html]:
    """The share of inserted states that was never sampled, and where it is greatest."""
    found = _found(last)
    if found is None:
        return []
    most = [
        f"{'timestep ' if kind == 'by_timestep' else ''}{worst[0]} {percent(worst[1])}"
        for kind in ("by_timestep", "by_actor")
        if (worst := most_starved(found[kind])) is not None and worst[1] >= LEAST_NOTABLE
    ]
    where = f" Most: {', '.join(most)}." if most else ""
    told = f" of the inserted states were never sampled ({count(found['live'])} of them were still live).{where}"
    return [el("p", el("b", percent(found["share"])), told)]


def starved_charts(last: Line) -> list[Chart]:
    """Shares by timestep, noisiest first, and by actor where there are several."""
    found = _found(last)
    if found is None or found["share"] == 0:
        return []
    by_timestep = sorted(found["by_timestep"].items(), key=lambda item: -int(item[0]))
    by_actor = sorted(found["by_actor"].items())
    charts = [_chart("Never sampled, by timestep", by_timestep)]
    return [*charts, _chart("Never sampled, by actor", by_actor)] if len(by_actor) > 1 else charts


def _found(last: Line) -> dict[str, Any] | None:
    found = last.get("never_sampled")
    return found if isinstance(found, dict) else None


def _chart(title: str, counts: Sequence[tuple[str, Mapping[str, int]]]) -> Chart:
    shares = [starved_share(each) for _, each in counts]
    ticks = range(0, len(counts), -(-len(counts) // MOST_TICKS))

    def draw(axes: Axes) -> None:
        axes.bar(range(len(shares)), shares, color=COLOURS["warn"], width=0.7)
        axes.set_xticks(ticks, [counts[place][0] for place in ticks], rotation=60 if len(ticks) > 6 else 0)
        axes.set_ylim(0, max(0.01, 1.05 * max(shares)))
        axes.yaxis.set_major_formatter(lambda value, _: percent(value))

    return Chart(title, draw, "share of the inserted states", wide=False, height=250)
