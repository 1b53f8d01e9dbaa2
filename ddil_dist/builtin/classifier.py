"""A small convolutional classifier of 32x32 clothes, whose penultimate layer is the space of the built-in metrics.

It plays Inception's part for the built-in teacher: Frechet distance, density and coverage are taken on its 64
features, and its classes tell whether an image shows what its prompt names. Colour is averaged away.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddil_dist.builtin.captions import CLASS_NAMES

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def _block(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.SiLU())


class Classifier(nn.Module):
    """Logits of the ten classes, and the features before them."""

    def __init__(self, *, width: int = 32, num_features: int = 64) -> None:
        super().__init__()
        self.width = width
        self.num_features = num_features
        """Length of the feature vector; the attribute that torchmetrics' FrechetInceptionDistance asks for."""
        self.backbone = nn.Sequential(
            _block(1, width),
            _block(width, width, stride=2),
            _block(width, 2 * width),
            _block(2 * width, 2 * width, stride=2),
            _block(2 * width, 3 * width),
            _block(3 * width, 3 * width, stride=2),
        )
        self.project = nn.Linear(3 * width * 4, num_features)
        self.head = nn.Linear(num_features, len(CLASS_NAMES))

    def features(self, images: Tensor) -> Tensor:
        """images: [B, 3, 32, 32] float in [0, 1]. Returns [B, num_features] float, the penultimate activations."""
        if images.shape[1:] != (3, 32, 32) or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} of shape {list(images.shape)}; the built-in classifier reads float "
                "images of shape [B, 3, 32, 32] in [0, 1]; resize or convert them first"
            )
        x = (images.mean(dim=1, keepdim=True) - 0.22) / 0.33
        return F.silu(self.project(F.avg_pool2d(self.backbone(x), 2).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, 32, 32] float in [0, 1]. Returns [B, 10] logits, in the order of CLASS_NAMES."""
        logits: Tensor = self.head(self.features(images))
        return logits


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write weights (half precision) and config to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / WEIGHTS)
    config = {"width": classifier.width, "num_features": classifier.num_features}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_classifier(folder: Path) -> Classifier:
    """Load a classifier in float32, in evaluation mode and without gradients."""
    classifier = Classifier(**json.loads((folder / CONFIG).read_text()))
    classifier.load_state_dict(load_file(folder / WEIGHTS))
    return classifier.float().eval().requires_grad_(False)


@torch.no_grad()
def batched_features(classifier: Classifier, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """[N, 3, 32, 32] images in [0, 1] to [N, num_features] features, a batch at a time."""
    return torch.cat([classifier.features(batch) for batch in images.split(batch_size)])
