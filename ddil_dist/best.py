"""What is recorded of a run's best student: `best.json` beside its weights, and in its pipeline. Imports no torch.

The learner measures, decides and writes `kept/`; the end of the run makes `student_best/` of it, the record inside.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ddil_dist.config import RunConfig
from ddil_dist.errors import DataError
from ddil_dist.metrics.protocol import METRICS, Metric

KEPT_DIRECTORY: Final = "kept"
RECORD_FILE: Final = "best.json"


@dataclass(frozen=True)
class Measure:
    """By what, and on what, students are compared: values of different measures are not."""

    metric: str
    """A `Metric.key`."""
    num_images: int
    guidance_scale: float
    seed: int
    """Of the evaluation; the held-out noises follow from it."""

    @classmethod
    def of(cls, config: RunConfig) -> Measure | None:
        """The run's; None where it keeps no best student."""
        keep = config.learner.keep_best
        if keep is None:
            return None
        return cls(keep.metric, keep.images, config.evaluation_guidance_scale, config.evaluation.seed)

    @property
    def shown(self) -> Metric:
        """How the metric is called, ranked and written."""
        return next(metric for metric in METRICS if metric.key == self.metric)

    def is_better(self, value: float, than: float) -> bool:
        return value < than if self.shown.better == "lower" else value > than


@dataclass(frozen=True)
class Best:
    """The best student so far, and the last that was measured. Values: of the measure's metric."""

    measure: Measure
    update: int
    value: float
    last_update: int
    last_value: float | None
    """None: not finite."""
    file: str
    """Its weights, beside the record."""
    digest: str
    """Of that file."""

    @property
    def ahead(self) -> float | None:
        """By how much it is better than the last, at least 0."""
        return None if self.last_value is None else abs(self.value - self.last_value)

    @property
    def policy_name(self) -> str:
        """In tables."""
        return f"best, update {self.update}"

    def sentence(self) -> str:
        """Which it is, by what, and what the last has."""
        shown, told = self.measure.shown, f"update {self.update:,}"
        by = f"{shown.label} {shown.show(self.value)} on {self.measure.num_images} held-out images"
        if self.update == self.last_update:
            return f"{told}, the last: {by}"
        return f"{told}: {by}, the last, of update {self.last_update:,}, {shown.show(self.last_value)}"

    def facts(self) -> dict[str, Any]:
        """As results.json has it."""
        return {
            **asdict(self.measure),
            "update": self.update,
            "value": self.value,
            "last_update": self.last_update,
            "last_value": self.last_value,
            "ahead": self.ahead,
        }


def read_best(directory: Path) -> Best | None:
    """The record in a directory; None if there is none. Raises DataError if it cannot be read."""
    path = directory / RECORD_FILE
    if not path.is_file():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return Best(**{**plain, "measure": Measure(**plain["measure"])})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no record of a best student ({error!r}); remove {directory}") from error


def write_best(directory: Path, best: Best) -> None:
    """Write the record at once: a reader sees the old one or the new one. Raises OSError."""
    path = directory / RECORD_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(best), indent=1), encoding="utf-8")
    partial.replace(path)
