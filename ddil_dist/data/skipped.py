"""Rows of the data that were skipped, as processes tell of them and as people are told.

A process says in its heartbeat or its status, under "data", how many rows there are and how many of them it has found
unusable: `{"num_rows": 5000, "num_skipped": 12}`. All read the same data, each in an order of its own, so the most that
any of them has found is what is known. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def most_skipped(statuses: Iterable[Mapping[str, Any]]) -> dict[str, int] | None:
    """What the process tells that has skipped most rows; None where none was skipped."""
    told = [data for status in statuses if (data := status.get("data")) and data.get("num_skipped")]
    most = max(told, key=lambda data: int(data["num_skipped"]), default=None)
    return None if most is None else {key: most.get(key, 0) for key in ("num_rows", "num_skipped")}


def sentence(data: Mapping[str, int]) -> str:
    """For people."""
    were = "was" if data["num_skipped"] == 1 else "were"
    return (
        f"{data['num_skipped']:,} of {data['num_rows']:,} rows of the data {were} skipped: no image that decodes, or "
        "no caption"
    )
