"""Feature networks: images in, the vectors in which Frechet distance, density and coverage are measured.

The built-in classifier measures the built-in pipeline; Inception v3 (pool3, the torch-fidelity port of the original
TensorFlow weights) is what papers report. A distance in one network's space says nothing about another's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ddil_dist.errors import EnvironmentFailure
from ddil_dist.evaluation.choice import INCEPTION_WEIGHTS, cached_inception

"""File name of the port's weights, as torch.hub caches it."""


class FeatureNetwork(Protocol):
    """A function from images to feature vectors, with the name that the protocol reports."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """[B, D] float features of `images`, float [B, 3, H, W] in [0, 1]."""
        ...


class ClassifierFeatures:
    """Penultimate features of the built-in Fashion-MNIST classifier."""

    name = "builtin-classifier"

    def __init__(self, classifier: Any | None = None, *, device: torch.device | str = "cpu") -> None:
        """Load the built-in classifier onto `device`, or use the one given (it must have `features`)."""
        if classifier is None:
            from ddil_dist.builtin import load_classifier

            classifier = load_classifier()
        self._classifier = classifier.to(device).eval()
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[B, D] float32 features of `images`, float [B, 3, 32, 32] in [0, 1]."""
        features: Tensor = self._classifier.features(images.to(self._device, torch.float32))
        return features


class InceptionFeatures:
    """Inception v3's 2048 pool3 features, the network of published FIDs.

    Images are rounded to 8 bits, as saved images are, and resized to 299 x 299 by antialiased bilinear interpolation.
    """

    name = "inception-v3-compat-pool3"

    def __init__(self, *, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        """Load the network; without `weights` (a file) they are downloaded once into torch.hub's cache.

        Raises EnvironmentFailure if torch-fidelity is not installed or the weights cannot be had.
        """
        self._device = torch.device(device)
        self._network = _load_inception(weights).to(self._device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[B, 2048] float32 features of `images`, float [B, 3, H, W] in [0, 1]."""
        features: Tensor = self._network(to_uint8(images).to(self._device))
        return features


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as the nearest of 256 levels; values outside are clamped."""
    return images.float().mul(255).round().clamp(0, 255).to(torch.uint8)


def extract_features(images: Tensor, network: FeatureNetwork, *, batch_size: int = 100) -> Tensor:
    """[N, D] float64 features on the CPU of `images` [N, 3, H, W], `batch_size` at a time."""
    return torch.cat([network(batch).double().cpu() for batch in torch.split(images, batch_size)])


def _load_inception(weights: Path | None) -> Any:
    try:
        import torch_fidelity  # noqa: F401  (torchmetrics imports its network only where this is installed)
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ModuleNotFoundError as error:
        raise EnvironmentFailure(
            f"Inception v3 needs the package '{error.name}', which is not installed; "
            "install the extra that brings it: pip install 'ddil_dist[evaluation]'"
        ) from error
    try:
        return NoTrainInceptionV3(
            name="inception-v3-compat",
            features_list=["2048"],
            feature_extractor_weights_path=None if weights is None else str(weights),
        )
    except (OSError, RuntimeError) as error:
        cache = cached_inception()
        source = "download" if weights is None else f"read from {weights}"
        raise EnvironmentFailure(
            f"Inception v3's weights did not {source}: {error}; fetch {INCEPTION_WEIGHTS} from the torch-fidelity "
            f"releases on a machine with network access and put it at {cache}"
        ) from error
