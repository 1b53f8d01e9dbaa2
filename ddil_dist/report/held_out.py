"""The student by a held-out metric as it trained, and which one was kept as the best."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from ddil_dist.config.curriculum import BEST_DIRECTORY
from ddil_dist.metrics.protocol import METRICS, Metric
from ddil_dist.report.charts import COLOURS, Chart, line, x_label
from ddil_dist.report.html import Html, count, el
from ddil_dist.report.record import Line, RunRecord
from ddil_dist.report.series import column, number


def held_out_sentence(run: RunRecord) -> Html | None:
    """Which student was the best, and by how much it beats the last; None where none was kept."""
    last, metric = _last(run)
    best, value = _best(last)
    if metric is None or not np.isfinite([best, value]).all():
        return None
    newest, ours = number(last.get("update")), number(last.get("value"))
    told = f"By {metric.label} ({metric.better} is better) on held-out noise the best student was "
    if best == newest:
        return el("p", told, el("b", "the last"), f", of update {count(best)}: {metric.show(value)}.")
    worse = f", {metric.show(abs(ours - value))} worse" if np.isfinite(ours) else ""
    return el(
        "p", told, "that of ", el("b", f"update {count(best)}"), f": {metric.show(value)}, in {BEST_DIRECTORY}/. The "
        f"last, of update {count(newest)}, has {metric.show(ours)}{worse}.",
    )  # fmt: skip


def held_out_charts(run: RunRecord) -> list[Chart]:
    """The metric by update, with the best marked."""
    last, metric = _last(run)
    lines = [each for each in run.of("held_out") if each.get("metric") == last.get("metric")]
    x, y = column(lines, "update"), column(lines, "value")
    if metric is None or not np.isfinite(y).any():
        return []
    best, value = _best(last)

    def draw(axes: Axes) -> None:
        known = np.isfinite(y)
        line(axes, x[known], y[known], "student")
        axes.plot([best], [value], color=COLOURS["gold"], marker="o", markersize=9, linestyle="none")
        x_label(axes, "update")

    keys = [("the student", "student"), ("the best", "gold")]
    return [Chart(f"{metric.label}, held out", draw, f"{metric.better} is better", keys, wide=False, height=250)]


def _last(run: RunRecord) -> tuple[Line, Metric | None]:
    """The newest measurement, and its metric."""
    lines = run.of("held_out")
    last: Line = lines[-1] if lines else {}
    return last, next((metric for metric in METRICS if metric.key == last.get("metric")), None)


def _best(last: Line) -> tuple[float, float]:
    return number(last.get("best_update")), number(last.get("best_value"))
