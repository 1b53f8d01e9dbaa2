"""Diversity by perceptual distance: for each prompt the mean over pairs of its images, then the mean over prompts.

LPIPS (Zhang et al. 2018) compares unit-normalised features of AlexNet, weighted by heads that were fitted to people's
judgements, which torchmetrics ships. On the built-in problem its classifier stands in, unweighted: its figures compare
with no LPIPS.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ddil_dist.builtin.classifier import Classifier
from ddil_dist.errors import ConfigError
from ddil_dist.metrics.intervals import Interval, interval, resampled_means

NUM_PROMPTS = 50
NUM_SEEDS = 10
"""As papers measure it."""
RESAMPLING_SEED = 0


class PerceptualDistance(Protocol):
    """Of pairs of images."""

    name: str

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """[N] float32 of images [N, 3, H, W] in [0, 1]."""


class Lpips:
    """LPIPS by AlexNet, whose weights are torchvision's file `alexnet-owt-7be5be79.pth` or a state dict of its keys.

    Raises ConfigError where `weights` holds anything else.
    """

    name = "LPIPS, AlexNet"

    def __init__(self, weights: Path, *, device: torch.device) -> None:
        from torchmetrics.functional.image.lpips import _LPIPS

        network = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
        own = network.net.state_dict()
        try:
            found = torch.load(weights, map_location="cpu", weights_only=True)
            named = {name: found[f"features.{name.partition('.')[2]}"] for name in own}
            network.net.load_state_dict(named)
        except Exception as error:  # a file of any other kind
            raise ConfigError(
                f"--lpips: {str(weights)!r} does not hold AlexNet's weights ({type(error).__name__}); give "
                "torchvision's alexnet-owt-7be5be79.pth"
            ) from error
        self._network = network.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = self._network(a.to(self._device) * 2 - 1, b.to(self._device) * 2 - 1)
        return found.flatten(1).mean(1).float().cpu()


class ClassifierDistance:
    """The mean over the built-in classifier's blocks of the squared distance of unit-normalised features."""

    name = "the built-in classifier, unweighted"

    def __init__(self, classifier: Classifier, *, device: torch.device) -> None:
        self._blocks: nn.Sequential = classifier.to(device).backbone
        self._device = device

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        x, y = ((images.to(self._device).mean(1, keepdim=True) - 0.22) / 0.33 for images in (a, b))
        found = torch.zeros(len(a), device=self._device)
        for block in self._blocks:
            x, y = block(x), block(y)
            found += (nn.functional.normalize(x) - nn.functional.normalize(y)).square().sum(1).mean((1, 2))
        return (found / len(self._blocks)).cpu()


def diversity(images_by_prompt: Iterable[Tensor], distance: PerceptualDistance) -> Interval:
    """Mean pairwise distance of each prompt's images [S, 3, H, W], S of 2 or more, averaged; prompts are resampled."""
    means = []
    for images in images_by_prompt:
        first, second = zip(*itertools.combinations(range(len(images)), 2), strict=True)
        means.append(float(distance(images[list(first)], images[list(second)]).double().mean()))
    return interval(resampled_means(np.array([means]), seed=RESAMPLING_SEED)[:, 0])
