"""All metrics of one policy's images, by the networks at hand, with intervals; and two policies' differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_dist.errors import DataError
from ddil_dist.metrics.agreement import agreements
from ddil_dist.metrics.clip_score import ClipScorer
from ddil_dist.metrics.diversity import density_coverage
from ddil_dist.metrics.features import ClassifierFeatures, FeatureNetwork, extract_features
from ddil_dist.metrics.fid import GaussianStatistics, frechet_distance
from ddil_dist.metrics.intervals import NUM_GROUPS, Interval, interval, jackknife, resampled_means


@dataclass(frozen=True)
class EvaluationNetworks:
    """What to measure with; a metric whose part is None is left out."""

    features: FeatureNetwork | None = None
    reference: GaussianStatistics | None = None
    """Of real images' features, for FID."""
    reference_features: Tensor | None = None
    """[R, D] of real images, for density and coverage."""
    clip: ClipScorer | None = None
    preference: ClipScorer | None = None
    """HPSv2's network: a CLIP score by a model that was trained on people's choices (Wu et al. 2023)."""
    classify: Callable[[Tensor], Tensor] | None = None
    """Images [B, 3, H, W] to logits [B, classes], for agreement."""
    resize: str = "none"
    """What `features` does to the images first, for the protocol."""

    @property
    def feature_name(self) -> str:
        """For the protocol."""
        return "none" if self.features is None else self.features.name

    @property
    def clip_name(self) -> str | None:
        """For the protocol."""
        return None if self.clip is None else self.clip.name


@dataclass(frozen=True)
class Batch:
    """Some of a policy's images, float [B, 3, H, W] in [0, 1], and what was asked for."""

    images: Tensor
    captions: Sequence[str]
    class_indices: Sequence[int] | None = None
    """The prompted classes for agreement, or None where captions name none."""


@dataclass(frozen=True)
class Measurements:
    """What the networks make of a policy's images, a row an image; rows of equal number are pairs.

    features: [N, D]; scores: [N] by the key of the metric that is their mean; all float64 on the CPU.
    """

    features: Tensor | None
    scores: Mapping[str, Tensor]


@torch.no_grad()
def measure_images(batches: Iterable[Batch], networks: EvaluationNetworks) -> Measurements:
    """Look at every image once, with every network.

    Raises DataError for fewer images than captions or a pixel that is not finite.
    """
    features: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {}
    for batch in batches:
        if len(batch.images) != len(batch.captions):
            raise DataError(
                f"{len(batch.images)} images for {len(batch.captions)} captions; every caption needs its image"
            )
        if not torch.isfinite(batch.images).all():
            raise DataError("a pixel is not finite (NaN or infinity); the policy diverged or its precision is too low")
        if networks.features is not None:
            features.append(extract_features(batch.images, networks.features))
        for key, score in _scores(batch, networks).items():
            scores.setdefault(key, []).append(score.double().cpu())
    return Measurements(
        torch.cat(features) if features else None, {key: torch.cat(parts) for key, parts in scores.items()}
    )


def _scores(batch: Batch, networks: EvaluationNetworks) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    for key, scorer in (("clip_score", networks.clip), ("preference", networks.preference)):
        if scorer is not None:
            scores[key] = scorer.similarities(batch.images, batch.captions)
    if networks.classify is not None and batch.class_indices is not None:
        scores["agreement"] = agreements(batch.images, batch.class_indices, networks.classify)
    return scores


def evaluate_images(
    images: Tensor, captions: Sequence[str], class_indices: Sequence[int] | None, networks: EvaluationNetworks
) -> dict[str, float]:
    """The metrics, by key of `protocol.METRICS`, of `images`, float [N, 3, H, W] in [0, 1], N >= 2."""
    return metric_values(measure_images([Batch(images, captions, class_indices)], networks), networks)


def metric_values(found: Measurements, networks: EvaluationNetworks) -> dict[str, float]:
    """Every metric that was measured, by its key."""
    values = {key: float(score.mean()) for key, score in found.scores.items()}
    for key, statistic in _statistics(networks).items():
        if found.features is not None:
            values[key] = statistic(found.features)
    return values


def metric_intervals(found: Measurements, networks: EvaluationNetworks, *, seed: int = 0) -> dict[str, Interval]:
    """The same with intervals; a statistic of too few images for one is left out."""
    return _intervals(found, None, networks, seed)


def metric_differences(
    found: Measurements, baseline: Measurements, networks: EvaluationNetworks, *, seed: int = 0
) -> dict[str, Interval]:
    """Each metric of `found` less that of `baseline`, whose images were made from the same noise and captions.

    Pairs are resampled as pairs, so what both owe to their noise and captions cancels.
    """
    return _intervals(found, baseline, networks, seed)


def _intervals(
    found: Measurements, baseline: Measurements | None, networks: EvaluationNetworks, seed: int
) -> dict[str, Interval]:
    intervals: dict[str, Interval] = {}
    for key, score in found.scores.items():
        if baseline is not None:
            if key not in baseline.scores:
                continue
            score = score - baseline.scores[key]
        intervals[key] = interval(resampled_means(score.numpy()[None], seed=seed)[:, 0])
    if found.features is None or len(found.features) < 2 * NUM_GROUPS:
        return intervals
    if baseline is not None and baseline.features is None:
        return intervals
    for key, statistic in _statistics(networks).items():
        ours, theirs = found.features, None if baseline is None else baseline.features

        def difference(
            rows: np.ndarray[Any, Any],
            statistic: Callable[[Tensor], float] = statistic,
            ours: Tensor = ours,
            theirs: Tensor | None = theirs,
        ) -> float:
            index = torch.from_numpy(rows)
            return statistic(ours[index]) - (0.0 if theirs is None else statistic(theirs[index]))

        intervals[key] = jackknife(difference, len(ours), seed=seed)
    return intervals


def _statistics(networks: EvaluationNetworks) -> dict[str, Callable[[Tensor], float]]:
    """Metrics of a whole set's features, by key."""
    statistics: dict[str, Callable[[Tensor], float]] = {}
    reference, real = networks.reference, networks.reference_features
    if reference is not None:
        statistics["fid"] = lambda features: frechet_distance(reference, GaussianStatistics.of(features))
    if real is not None:
        statistics["density"] = lambda features: density_coverage(real, features).density
        statistics["coverage"] = lambda features: density_coverage(real, features).coverage
    return statistics


def builtin_networks(*, device: torch.device | str = "cpu") -> EvaluationNetworks:
    """The built-in classifier, its reference statistics and the small OpenCLIP model: no download."""
    from ddil_dist.builtin import load_classifier, load_reference

    classifier = load_classifier().to(device).eval()
    mean, covariance, count, reference_features = load_reference()
    return EvaluationNetworks(
        features=ClassifierFeatures(classifier, device=device),
        reference=GaussianStatistics(mean, covariance, count),
        reference_features=reference_features,
        clip=ClipScorer.builtin(device=device),
        classify=lambda images: classifier(images.to(device)),
    )
