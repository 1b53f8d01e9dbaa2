"""Trains the classifier and writes what metrics compare with: statistics of the whole test set's features."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ddil_dist.builtin.classifier import Classifier, batched_features
from ddil_dist.builtin.training.dataset import Split, balanced_indices, to_rgb
from ddil_dist.builtin.training.loop import Plan, fit

PLAN = Plan(updates=3600, batch_size=128, lr=2e-3, warmup=200, fall=0.7, weight_decay=0.05, ema_decay=0.99, seed=3)
MAX_SHIFT = 2
ERASED = 8
NUM_REFERENCE_FEATURES = 2000


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift a batch by up to two pixels and erase one random square of each image; no flips. [B, 3, 32, 32]."""
    num, device = len(images), images.device
    dy, dx = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=generator, device=device).tolist()
    images = images.roll((dy, dx), dims=(2, 3))
    top_left = torch.randint(-ERASED + 1, 32, (2, num, 1), generator=generator, device=device)
    inside = torch.arange(32, device=device) - top_left
    rows, columns = (inside >= 0) & (inside < ERASED)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def train_classifier(split: Split, *, checkpoint: Path, device: torch.device) -> Classifier:
    """Train with label smoothing 0.05 and light augmentation."""
    torch.manual_seed(PLAN.seed)
    classifier = Classifier()
    images, labels = split.images.to(device), split.labels.to(device)

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        logits = classifier(_augment(to_rgb(images[indices]), generator))
        return F.cross_entropy(logits, labels[indices], label_smoothing=0.05)

    fit(classifier, loss, plan=PLAN, num_samples=len(images), checkpoint=checkpoint, device=device)
    return classifier


def write_reference(classifier: Classifier, test: Split, path: Path, *, device: torch.device) -> float:
    """Write the test set's feature statistics and a balanced subset of features; return the test accuracy.

    Tensors: mean [D] and covariance [D, D] (unbiased) float64, count [1] int64, features [2000, D] float16.
    """
    classifier.to(device)
    images = to_rgb(test.images.to(device))
    features = batched_features(classifier, images).double().cpu()
    with torch.no_grad():
        predicted = classifier.head(features.float().to(device)).argmax(dim=1).cpu()
    chosen = balanced_indices(test.labels, NUM_REFERENCE_FEATURES)
    save_file(
        {
            "mean": features.mean(dim=0),
            "covariance": torch.cov(features.T).contiguous(),
            "count": torch.tensor([len(features)]),
            "features": features[chosen].half(),
        },
        path,
    )
    return float((predicted == test.labels).double().mean())
