"""Agreement: the share of images that a classifier gives the class their caption asked for.

Only where captions name one class of a known list, as the built-in pipeline's do. A policy that ignores its prompt
scores 1 / number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def agreements(
    images: Tensor, class_indices: Sequence[int], classify: Callable[[Tensor], Tensor], *, batch_size: int = 100
) -> Tensor:
    """[N] float64, 1 where the most probable class of an image [N, 3, H, W] in [0, 1] is the prompted one, else 0.

    classify: images [B, 3, H, W] to logits [B, classes].
    """
    assert len(images) == len(class_indices), f"{len(images)} images with {len(class_indices)} classes"
    predicted = torch.cat([classify(batch).argmax(dim=1).cpu() for batch in torch.split(images, batch_size)])
    return (predicted == torch.as_tensor(class_indices)).double()
