"""Agreement: the share of images that a classifier gives the class their caption asked for.

Only where captions name one class of a known list, as the built-in pipeline's do. A policy that ignores its prompt
scores 1 / number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def agreement(
    images: Tensor, class_indices: Sequence[int], classify: Callable[[Tensor], Tensor], *, batch_size: int = 100
) -> float:
    """Share in [0, 1] of `images` [N, 3, H, W] in [0, 1] whose most probable class is the prompted one.

    classify: images [B, 3, H, W] to logits [B, classes].
    """
    assert len(images) == len(class_indices), f"{len(images)} images with {len(class_indices)} classes"
    predicted = torch.cat([classify(batch).argmax(dim=1).cpu() for batch in torch.split(images, batch_size)])
    return float((predicted == torch.as_tensor(class_indices)).double().mean())
