"""All metrics of one policy's images, by the networks that a run measures with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_dist.errors import DataError
from ddil_dist.metrics.agreement import agreement
from ddil_dist.metrics.clip_score import ClipScorer, clip_score
from ddil_dist.metrics.diversity import density_coverage
from ddil_dist.metrics.features import ClassifierFeatures, FeatureNetwork, extract_features
from ddil_dist.metrics.fid import GaussianStatistics, frechet_distance


@dataclass(frozen=True)
class EvaluationNetworks:
    """What to measure with; a metric whose part is None is left out."""

    features: FeatureNetwork
    reference: GaussianStatistics | None = None
    """Of real images' features, for FID."""
    reference_features: Tensor | None = None
    """[R, D] of real images, for density and coverage."""
    clip: ClipScorer | None = None
    classify: Callable[[Tensor], Tensor] | None = None
    """Images [B, 3, H, W] to logits [B, classes], for agreement."""
    resize: str = "none"
    """What `features` does to the images first, for the protocol."""


def evaluate_images(
    images: Tensor, captions: Sequence[str], class_indices: Sequence[int] | None, networks: EvaluationNetworks
) -> dict[str, float]:
    """The metrics, by key of `protocol.METRICS`, of `images`, float [N, 3, H, W] in [0, 1], N >= 2.

    captions: N texts. class_indices: N prompted classes for agreement, or None where captions name none.
    Raises DataError for fewer images than captions or a pixel that is not finite.
    """
    if len(images) != len(captions):
        raise DataError(f"{len(images)} images for {len(captions)} captions; every caption needs its image")
    if not torch.isfinite(images).all():
        raise DataError("a pixel is not finite (NaN or infinity); the policy diverged or its precision is too low")
    metrics: dict[str, float] = {}
    features = extract_features(images, networks.features)
    if networks.reference is not None:
        metrics["fid"] = frechet_distance(networks.reference, GaussianStatistics.of(features))
    if networks.clip is not None:
        metrics["clip_score"] = clip_score(images, captions, networks.clip)
    if networks.classify is not None and class_indices is not None:
        metrics["agreement"] = agreement(images, class_indices, networks.classify)
    if networks.reference_features is not None:
        spread = density_coverage(networks.reference_features, features)
        metrics |= {"density": spread.density, "coverage": spread.coverage}
    return metrics


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
