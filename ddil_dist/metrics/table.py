"""The results as a table for the terminal, of 80 columns at the least. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ddil_dist.metrics.protocol import PolicyResult, best_names, present_metrics


def results_table(results: Sequence[PolicyResult], *, title: str | None = None) -> Table:
    """A rich table, one row a policy; the best number of every column, the teacher's apart, is bold green.

    Its columns are a space apart, and as wide as their numbers, so that all metrics fit.
    """
    metrics = present_metrics(results)
    best = {metric.key: best_names(results, metric) for metric in metrics}
    table = Table(title=title, header_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("policy", vertical="bottom")
    table.add_column("NFEs", justify="right", vertical="bottom")
    for metric in metrics:
        table.add_column(metric.narrow_label, justify="right", vertical="bottom")
    table.add_column("s/image", justify="right", vertical="bottom")
    for result in results:
        cells = [
            Text(metric.show(result.metrics.get(metric.key)), "bold green" if result.name in best[metric.key] else "")
            for metric in metrics
        ]
        table.add_row(Text(result.name), str(result.protocol.nfes_per_image), *cells, f"{result.seconds_per_image:.3g}")
    return table
