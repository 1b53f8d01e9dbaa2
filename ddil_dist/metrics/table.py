"""The results as a table for the terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ddil_dist.metrics.protocol import PolicyResult, best_names, present_metrics

TABLE_METRICS = ("fid", "clip_score", "agreement", "paired_trajectory_error")
"""Columns that the terminal has room for, where some policy has the metric; the report shows all."""


def results_table(results: Sequence[PolicyResult], *, title: str | None = None) -> Table:
    """A rich table, one row a policy; the best number of every column, the teacher's apart, is bold green."""
    metrics = [metric for metric in present_metrics(results) if metric.key in TABLE_METRICS]
    best = {metric.key: best_names(results, metric) for metric in metrics}
    table = Table(title=title, header_style="bold")
    table.add_column("policy")
    for label in ("steps", "NFEs"):
        table.add_column(label, justify="right")
    for metric in metrics:
        table.add_column(f"{metric.label} {metric.arrow}", justify="right")
    table.add_column("s/image", justify="right")
    for result in results:
        cells = [
            Text(metric.show(result.metrics.get(metric.key)), "bold green" if result.name in best[metric.key] else "")
            for metric in metrics
        ]
        table.add_row(
            Text(result.name),
            str(result.protocol.steps),
            str(result.protocol.nfes_per_image),
            *cells,
            f"{result.seconds_per_image:.4g}",
        )
    return table
