"""What images are measured with where it does not ship: files that the user names, or what a download left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ddil_dist.builtin import load_classifier
from ddil_dist.errors import ConfigError, DataError
from ddil_dist.metrics.clip_score import PAPER_MODEL, ClipScorer
from ddil_dist.metrics.evaluate import EvaluationNetworks
from ddil_dist.metrics.features import INCEPTION_WEIGHTS, InceptionFeatures, extract_features
from ddil_dist.metrics.fid import RunningGaussian
from ddil_dist.metrics.perceptual import ClassifierDistance, Lpips, PerceptualDistance

HPS_MODEL = "ViT-H-14"
HPS_WEIGHTS = "HPS_v2.1_compressed.pt"
MAX_NEIGHBOURS = 10_000
"""Real vectors kept for density and coverage, whose cost is theirs times the images'."""
RESIZE = "299 bilinear antialiased"


@dataclass(frozen=True)
class NetworkChoice:
    """Where the networks are; None: the metric is measured only if its weights lie where a download leaves them."""

    inception: Path | None = None
    """Weights of Inception v3, torch-fidelity's port."""
    clip: str | None = None
    """OpenCLIP's 'name/weights', 'hf-hub:owner/name' or 'local-dir:folder'."""
    preference: Path | None = None
    """HPSv2's weights."""
    lpips: Path | None = None
    """Weights of AlexNet, torchvision's."""


def load_networks(choice: NetworkChoice, *, device: torch.device) -> tuple[EvaluationNetworks, list[str]]:
    """The networks that are at hand, without any reference, and a sentence for each metric that will be missing.

    Raises ConfigError or EnvironmentFailure where one that was named cannot be had.
    """
    missing: list[str] = []
    features = None
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if choice.inception is not None or cached.is_file():
        _must_exist("inception", choice.inception)
        features = InceptionFeatures(weights=choice.inception or cached, device=device)
    else:
        missing.append(
            f"FID, density and coverage need Inception v3: put {INCEPTION_WEIGHTS}, of torch-fidelity's releases, at "
            f"{cached}, or name it by --inception"
        )
    clip = None
    if choice.clip is not None:
        name, _, weights = choice.clip.partition("/")
        whole = choice.clip.startswith(("hf-hub:", "local-dir:"))
        clip = ClipScorer.load(choice.clip if whole else name, None if whole else weights or None, device=device)
    else:
        missing.append(
            f"the CLIP score needs a model: --clip {'/'.join(PAPER_MODEL)} is the papers', and "
            "--clip local-dir:FOLDER one that was downloaded"
        )
    preference = None
    if choice.preference is not None:
        _must_exist("hps", choice.preference)
        preference = ClipScorer.load(HPS_MODEL, str(choice.preference), device=device)
    else:
        missing.append(f"HPSv2 needs its weights, {HPS_WEIGHTS} of its repository on the hub: name them by --hps")
    return EvaluationNetworks(features=features, clip=clip, preference=preference, resize=RESIZE), missing


def load_distance(choice: NetworkChoice, *, builtin: bool, device: torch.device) -> PerceptualDistance:
    """What diversity is measured by: LPIPS, or on the built-in problem its classifier. Raises ConfigError."""
    if choice.lpips is not None:
        _must_exist("lpips", choice.lpips)
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


def _must_exist(option: str, path: Path | None) -> None:
    if path is not None and not path.is_file():
        raise ConfigError(f"--{option}: no file at {str(path)!r}; give the file of the weights")
