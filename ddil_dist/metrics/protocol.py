"""How a policy was evaluated, what came out, and how metrics are named, ranked and written. Imports no torch.

A number without its protocol cannot be compared; so `PolicyResult` carries both, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

ABSENT: Final = "\u2013"
"""Stands in tables, an en dash, for a number that there is not."""

Role = Literal["teacher", "student", "baseline"]
"""teacher: the expert that the others are measured against; student: what the run trained; baseline: the rest."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's key in `PolicyResult.metrics`, and how it is shown."""

    key: str
    label: str
    better: Literal["lower", "higher"]
    digits: int
    """Decimals shown."""
    narrow: str = ""
    """The label broken over lines, for narrow columns; "": the label."""

    @property
    def arrow(self) -> str:
        return "↓" if self.better == "lower" else "↑"

    @property
    def narrow_label(self) -> str:
        """Of a terminal's column: the label over lines, and the better direction."""
        return f"{self.narrow or self.label} {self.arrow}"

    def show(self, value: float | None) -> str:
        """The number as text; a dash where there is none or it is not finite."""
        return f"{value:.{self.digits}f}" if value is not None and math.isfinite(value) else ABSENT


METRICS: Final = (
    Metric("fid", "FID", "lower", 3),
    Metric("clip_score", "CLIP score", "higher", 4, "CLIP\nscore"),
    Metric("agreement", "agreement", "higher", 3, "agree-\nment"),
    Metric("paired_trajectory_error", "paired error", "lower", 4, "paired\nerror"),
    Metric("preference", "HPSv2", "higher", 4),
    Metric("lpips_diversity", "LPIPS diversity", "higher", 3, "LPIPS\ndiver-\nsity"),
    Metric("density", "density", "higher", 3, "den-\nsity"),
    Metric("coverage", "coverage", "higher", 3, "cover-\nage"),
)
"""Every metric, in the order of tables. Density has no best value (1 is expected); higher means more faithful."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Everything that must be equal for two policies' numbers to be comparable, and how the policy was sampled."""

    sampler: str
    """Such as "DDIM"."""
    steps: int
    """Denoising steps of a trajectory."""
    nfes_per_image: int
    """Evaluations of the network for one image; guidance without embedding doubles the steps."""
    guidance_scale: float
    """w of x_uncond + w (x_cond - x_uncond); 1 means none."""
    seed: int
    """Of the starting noises; the same seed means paired images."""
    num_images: int
    feature_network: str
    """Of FID, density and coverage."""
    resize: str
    """What was done to the images before the feature network, such as "none" or "299 bilinear antialiased"."""
    clip_model: str | None = None
    """Of the CLIP score."""
    diversity: str | None = None
    """Of LPIPS diversity: the network, prompts and images a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy's row of the results."""

    name: str
    """As people read it, such as "student, 4 steps"."""
    role: Role
    protocol: Protocol
    metrics: Mapping[str, float] = field(default_factory=dict)
    """By `Metric.key`; those not measured are absent."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Ends of the 95% interval of a metric, by its key, where one was computed."""
    seconds_per_image: float
    """Wall-clock time of sampling and decoding, divided by the number of images."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; a metric that is not finite becomes None, which JSON can hold."""
        plain = asdict(self)
        plain["metrics"] = {key: value if math.isfinite(value) else None for key, value in self.metrics.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> PolicyResult:
        """The inverse of `to_json`; a None metric comes back as NaN."""
        metrics = {key: math.nan if value is None else float(value) for key, value in plain["metrics"].items()}
        intervals = {key: (float(low), float(high)) for key, (low, high) in plain.get("intervals", {}).items()}
        return cls(**{**plain, "protocol": Protocol(**plain["protocol"]), "metrics": metrics, "intervals": intervals})


def present_metrics(results: Iterable[PolicyResult]) -> list[Metric]:
    """The metrics that at least one policy has, in the order of tables."""
    keys = {key for result in results for key in result.metrics}
    return [metric for metric in METRICS if metric.key in keys]


def best_names(results: Iterable[PolicyResult], metric: Metric) -> set[str]:
    """Names of the policies best by `metric` as shown, ties included; the teacher, being the measure, is left out."""
    values = {
        result.name: round(result.metrics[metric.key], metric.digits)
        for result in results
        if result.role != "teacher" and math.isfinite(result.metrics.get(metric.key, math.nan))
    }
    if not values:
        return set()
    best = min(values.values()) if metric.better == "lower" else max(values.values())
    return {name for name, value in values.items() if value == best}
