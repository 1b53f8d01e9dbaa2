"""Between torch tensors and latents at rest (`Latent`), whose bfloat16 travels as 16-bit patterns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddil_dist.types import Latent, LatentDtype


def to_latents(tensor: Tensor) -> list[Latent]:
    """Copies of the rows of a tensor [B, C, H, W] (float32, float16 or bfloat16) at rest, off the device in one go."""
    tensor = tensor.detach().cpu().contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return [Latent(row.copy(), dtype) for row in array]  # a row of its own does not keep the batch in memory


def to_latent(tensor: Tensor) -> Latent:
    """A copy of one latent [C, H, W] at rest."""
    return to_latents(tensor.unsqueeze(0))[0]


def to_tensor(array: npt.NDArray[Any], dtype: LatentDtype) -> Tensor:
    """The tensor, in its own dtype, that an array of latents at rest holds; shares its memory."""
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
