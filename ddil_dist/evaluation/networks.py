"""What images are measured with where it does not ship: files that the user names, or what a download left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ddil_dist.builtin import load_classifier
from ddil_dist.errors import ConfigError, DataError
from ddil_dist.evaluation.choice import NetworkChoice
from ddil_dist.metrics.clip_score import ClipScorer
from ddil_dist.metrics.evaluate import EvaluationNetworks
from ddil_dist.metrics.features import InceptionFeatures, extract_features
from ddil_dist.metrics.fid import RunningGaussian
from ddil_dist.metrics.perceptual import ClassifierDistance, Lpips, PerceptualDistance

HPS_MODEL = "ViT-H-14"
MAX_NEIGHBOURS = 10_000
"""Real vectors kept for density and coverage, whose cost is theirs times the images'."""
RESIZE = "299 bilinear antialiased"


def load_networks(choice: NetworkChoice, *, device: torch.device) -> tuple[EvaluationNetworks, list[str]]:
    """The networks that are at hand, without any reference, and a sentence for each metric that will be missing.

    Raises ConfigError or EnvironmentFailure where one that was named cannot be had.
    """
    choice.check()
    weights = choice.inception_weights()
    clip = None
    if choice.clip is not None:
        name, _, trained = choice.clip.partition("/")
        whole = choice.clip.startswith(("hf-hub:", "local-dir:"))
        clip = ClipScorer.load(choice.clip if whole else name, None if whole else trained or None, device=device)
    preference = None
    if choice.preference is not None:
        preference = ClipScorer.load(HPS_MODEL, str(choice.preference), device=device)
    features = None if weights is None else InceptionFeatures(weights=weights, device=device)
    networks = EvaluationNetworks(features=features, clip=clip, preference=preference, resize=RESIZE)
    return networks, choice.missing()


def load_distance(choice: NetworkChoice, *, builtin: bool, device: torch.device) -> PerceptualDistance:
    """What diversity is measured by: LPIPS, or on the built-in problem its classifier. Raises ConfigError."""
    if choice.lpips is not None:
        choice.check()
        return Lpips(choice.lpips, device=device)
    if builtin:
        return ClassifierDistance(load_classifier(), device=device)
    raise ConfigError(
        "--diversity: LPIPS needs AlexNet's weights, torchvision's alexnet-owt-7be5be79.pth: name them by --lpips"
    )


def with_reference(networks: EvaluationNetworks, images: Iterable[Tensor]) -> EvaluationNetworks:
    """The networks with real images to compare with: batches [B, 3, H, W] in [0, 1]. Raises DataError under two."""
    if networks.features is None:
        return networks
    running, kept, num = RunningGaussian(), [], 0
    for batch in images:
        features = extract_features(batch, networks.features)
        running.update(features)
        if num < MAX_NEIGHBOURS:
            kept.append(features[: MAX_NEIGHBOURS - num])
        num += len(features)
    if num < 2:
        raise DataError(f"{num} real images; FID compares with two or more, and papers with thousands")
    return replace(networks, reference=running.statistics(), reference_features=torch.cat(kept))
