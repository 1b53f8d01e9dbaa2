"""Rows of the data that were skipped, as processes tell of them and as people are told.

A process says in its heartbeat or its status, under "data", how many rows there are, how many of them it has found
unusable, and why: `{"num_rows": 5000, "num_skipped": 12, "skipped": {"no caption": 12}}`. All read the same data, each
in an order of its own, so the most that any of them has found is what is known. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

KEYS = ("num_rows", "num_skipped", "skipped")


def most_skipped(statuses: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the process tells that has skipped most rows; None where none was skipped."""
    told = [data for status in statuses if (data := status.get("data")) and data.get("num_skipped")]
    most = max(told, key=lambda data: int(data["num_skipped"]), default=None)
    return None if most is None else {"num_rows": 0} | {key: most[key] for key in KEYS if key in most}


def sentence(data: Mapping[str, Any]) -> str:
    """For people."""
    were = "was" if data["num_skipped"] == 1 else "were"
    told = f"{data['num_skipped']:,} of {data['num_rows']:,} rows of the data {were} skipped"
    return f"{told}: {by_reason(data['skipped'])}" if data.get("skipped") else told


def by_reason(skipped: Mapping[str, int]) -> str:
    """Numbers of skipped rows by what is wrong with them."""
    return ", ".join(f"{num:,} with {reason}" for reason, num in skipped.items())
