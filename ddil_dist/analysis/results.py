"""What an analysis found, as `analysis.json` holds it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddil_dist.errors import DataError
from ddil_dist.metrics.intervals import Interval

ANALYSIS_FILE = "analysis.json"

MixtureKind = Literal["alone", "random", "teacher first", "student first"]
"""One policy throughout; a draw at every transition; one policy up to a timestep, the other from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointShift:
    """A point where the student calls its network. Errors are mean squared, in VAE-scaled latents."""

    timestep: int
    error_forward: Interval
    """At data diffused forward to this timestep."""
    error_teacher: Interval
    """At the teacher's own states."""
    error_visited: Interval
    """At the states that the student reaches."""
    ratio: Interval
    """error_visited / error_forward."""
    distance_visited: float
    """Squared maximum mean discrepancy of visited from forward-diffused states; unbiased, so it may be below 0."""
    distance_teacher: float
    """Of the teacher's states from forward-diffused ones."""
    distance_floor: float
    """Of forward-diffused states from other forward-diffused ones."""
    p_visited: float
    """Of a `distance_visited` as large where both are of one distribution."""
    p_teacher: float
    final_error: Interval
    """Of the student's final latents, from the teacher's state at this point on, against the teacher's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftResult:
    """The shift along the student's path, noisiest point first."""

    points: Sequence[PointShift]
    overall: Interval | None
    """Geometric mean of the ratios after the first point, whose visited state is noise; None for one step."""

    @property
    def compounded(self) -> float | None:
        """The share of the final error that is gone where the teacher makes every step but the last."""
        whole, last = self.points[0].final_error.value, self.points[-1].final_error.value
        return None if len(self.points) == 1 or whole <= 0 else 1 - last / whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Trajectories whose transitions teacher and student share."""

    kind: MixtureKind
    teacher: float
    """The share of the transitions that it makes; of a random mixture, the probability of each."""
    timestep: int | None
    metrics: Mapping[str, float]
    """By `Metric.key`."""

    @property
    def name(self) -> str:
        if self.kind == "alone":
            return "teacher alone" if self.teacher else "student alone"
        if self.kind == "random":
            return f"teacher at {self.teacher:.0%}"
        return f"{self.kind.split()[0]} until t = {self.timestep}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Everything that `python -m ddil_dist.analyze` found."""

    protocol: Mapping[str, Any]
    shift: ShiftResult
    mixtures: Sequence[Mixture] = field(default_factory=tuple)


def write_analysis(path: Path, analysis: Analysis) -> None:
    """Write `analysis` to the file `path` at once."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(analysis), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_analysis(path: Path) -> Analysis:
    """Read what `write_analysis` wrote; raises DataError if the file is not that."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        shift = plain["shift"]
        points = [PointShift(**{key: _interval(value) for key, value in point.items()}) for point in shift["points"]]
        return Analysis(
            protocol=plain["protocol"],
            shift=ShiftResult(points=points, overall=_interval(shift["overall"])),
            mixtures=[Mixture(**mixture) for mixture in plain["mixtures"]],
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not an analysis ({error!r}); run the analysis again to rewrite it") from error


def _interval(value: Any) -> Any:
    return Interval(**value) if isinstance(value, dict) else value
