"""Journal lines as arrays: columns, averages, shares, rates and delays. Pure; tested against hand-counted runs."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Lines = Sequence[Mapping[str, Any]]

SOURCES = ("FORWARD", "STUDENT", "TEACHER", "NOISE")


def number(value: Any) -> float:
    """A JSON value as a float, NaN if it is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def column(lines: Lines, key: str, part: str | None = None) -> Floats:
    """[lines] values of `key`, or of `part` of the mapping at `key`; NaN where there is none."""
    values = [line.get(key) if part is None else (line.get(key) or {}).get(part) for line in lines]
    return np.array([number(value) for value in values], dtype=np.float64)


def total(lines: Lines, key: str) -> float:
    """Sum of a key over the lines that have it."""
    return float(np.nansum(column(lines, key))) if lines else 0.0


def thinned(x: Floats, y: Floats, *, limit: int = 480) -> tuple[Floats, Floats]:
    """At most `limit` points: means of equal runs of neighbours, so that long runs stay small and honest."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= limit:
        return x, y
    parts = np.array_split(np.arange(len(x)), limit)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def picked(lines: Lines, *, limit: int) -> Lines:
    """At most `limit` of the lines, evenly spaced, with the first and the last: for snapshots, which have no mean."""
    if len(lines) <= limit:
        return lines
    return [lines[index] for index in np.linspace(0, len(lines) - 1, limit).round().astype(int)]


def moving_average(y: Floats, window: int) -> Floats:
    """Centred mean over `window` neighbours, fewer at the ends; values that are not finite are left out."""
    known = np.isfinite(y)
    kernel = np.ones(max(1, min(window, len(y))))
    weight = np.convolve(known, kernel, mode="same")
    weighted = np.convolve(np.where(known, y, 0.0), kernel, mode="same")
    mean: Floats = np.divide(weighted, weight, out=np.full(len(y), np.nan), where=weight > 0.5)
    return mean


@dataclass(frozen=True)
class Shares:
    """Shares of several classes along an axis: column sums are 1 where anything was counted, else 0."""

    x: Floats
    """[X] positions."""
    names: Sequence[str]
    """[K] classes."""
    values: Floats
    """[K, X]."""


def shares(lines: Lines, key: str, x: Floats, names: Sequence[str], *, bins: int = 120) -> Shares:
    """Shares of the counts at `key` (a mapping by class name) among `names`, pooled over at most `bins` columns."""
    counts = np.stack([np.nan_to_num(column(lines, key, name)) for name in names])
    if counts.shape[1] > bins:
        parts = np.array_split(np.arange(counts.shape[1]), bins)
        counts = np.stack([counts[:, part].sum(axis=1) for part in parts], axis=1)
        x = np.array([x[part].mean() for part in parts])
    totals = counts.sum(axis=0)
    return Shares(x, names, np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0))


@dataclass(frozen=True)
class VersionMap:
    """Which policy versions made the states that training drew, over training."""

    update_range: tuple[float, float]
    version_range: tuple[float, float]
    shares: Floats
    """[versions, updates] of all states drawn in an update bin, student-made or not; a column sums to at most 1."""
    num_versions: int
    """Distinct versions seen."""
    student_share: float
    """Of all states drawn, those that a student transition led to."""
    trained_share: float
    """Of the states that a student transition led to, those whose student training had already changed."""
    mean_lag: float
    """Updates between the student that made a state and the student trained on it, on average."""


def version_map(updates: Lines, *, columns: int = 80, rows: int = 40) -> VersionMap | None:
    """Pool the `policy_versions` counts of the update lines; None if no state had a version."""
    cells = [
        (number(line.get("update")), int(version), number(count))
        for line in updates
        for version, count in (line.get("policy_versions") or {}).items()
    ]
    if not any(version >= 0 for _, version, _ in cells):
        return None
    update, version, count = (np.array(values, dtype=np.float64) for values in zip(*cells, strict=True))
    made = version >= 0
    distinct = np.unique(version[made])
    step = float(np.median(np.diff(distinct))) if len(distinct) > 1 else 1.0
    first, last = float(update.min()), float(update.max())
    top = max(float(distinct[-1]) + step, step)
    x_edges = np.linspace(first - 0.5, last + 0.5, min(columns, int(last - first) + 1) + 1)
    y_edges = np.linspace(0, top, int(min(rows, max(1, round(top / step)))) + 1)
    totals, _ = np.histogram(update, bins=x_edges, weights=count)
    table, _, _ = np.histogram2d(version[made], update[made], bins=(y_edges, x_edges), weights=count[made])
    of_student = float(count[made].sum())
    return VersionMap(
        update_range=(float(x_edges[0]), float(x_edges[-1])),
        version_range=(0.0, top),
        shares=np.divide(table, totals, out=np.zeros_like(table), where=totals > 0),
        num_versions=len(distinct),
        student_share=of_student / float(count.sum()),
        trained_share=float(count[version > 0].sum()) / of_student,
        mean_lag=float(((update - version)[made] * count[made]).sum()) / of_student,
    )


@dataclass(frozen=True)
class Delay:
    """How long a published version took to reach an actor."""

    version: int
    actor: str
    time: float
    """Of publication, unix seconds."""
    seconds: float
    """At least 0: clocks of two machines may disagree by a little."""


def publish_delays(published: Lines, applied: Lines) -> list[Delay]:
    """For every applied version whose publication is known, the time between the two."""
    times = {line.get("version"): number(line.get("time")) for line in published}
    return [
        Delay(
            version=line["version"],
            actor=str(line.get("actor", "?")),
            time=times[line["version"]],
            seconds=max(0.0, number(line.get("time")) - times[line["version"]]),
        )
        for line in applied
        if line.get("version") in times and np.isfinite(number(line.get("time")) - times[line["version"]])
    ]


class ActiveClock:
    """Maps unix seconds to seconds of activity: the hours between a stop and its resumption count as nothing.

    A pause is a gap between any two lines of over 300 s and of over 20 times the median gap.
    """

    def __init__(self, times: Sequence[float]) -> None:
        known = np.unique(np.array([time for time in times if np.isfinite(time)], dtype=np.float64))
        gaps = np.diff(known)
        limit = max(300.0, 20 * float(np.median(gaps))) if len(gaps) else 0.0
        self._times = known
        self._active = np.concatenate([[0.0], np.cumsum(np.where(gaps > limit, 0.0, gaps))])
        self.pauses: list[float] = [float(gap) for gap in gaps if gap > limit]
        """Seconds of each pause."""

    def __call__(self, times: Floats) -> Floats:
        """[n] seconds of activity since the first line, of unix `times` [n]."""
        if len(self._times) == 0:
            return np.zeros(len(times))
        active: Floats = np.interp(times, self._times, self._active)
        return active

    @property
    def seconds(self) -> float:
        """Of activity in all."""
        return float(self._active[-1])


def rates(seconds: Floats, amounts: Floats, *, bins: int) -> tuple[Floats, Floats]:
    """Amounts per second over equal stretches of time: (middles [bins], rates [bins]).

    seconds [n]: when each amount was complete; the stretch before the first is unknown, so the first is left out.
    """
    order = np.argsort(seconds, kind="stable")
    seconds, amounts = seconds[order], np.nan_to_num(amounts[order])
    if len(seconds) < 2 or seconds[-1] <= seconds[0]:
        return np.zeros(0), np.zeros(0)
    done = np.concatenate([[0.0], np.cumsum(amounts[1:])])
    edges = np.linspace(seconds[0], seconds[-1], bins + 1)
    at_edges = np.interp(edges, seconds, done)
    return (edges[1:] + edges[:-1]) / 2, np.diff(at_edges) / np.diff(edges)


def bands(versions: Sequence[int], *, limit: int = 8) -> list[list[int]]:
    """Versions in ascending order, pooled into at most `limit` runs of neighbours of about equal length."""
    ordered = sorted(set(versions))
    return [[int(v) for v in part] for part in np.array_split(ordered, min(limit, len(ordered)))] if ordered else []


def covering(parts: Sequence[Sequence[int]], version: int) -> int:
    """Index of the run of `bands` that holds `version`."""
    return max(0, bisect.bisect_right([part[0] for part in parts], version) - 1)
