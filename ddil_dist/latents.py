"""Between torch tensors and latents at rest (`Latent`), whose bfloat16 travels as 16-bit patterns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddil_dist.types import Latent, LatentDtype


def to_latent(tensor: Tensor) -> Latent:
    """A copy of a tensor [C, H, W] (float32, float16 or bfloat16) at rest."""
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype == torch.bfloat16:
        return Latent(tensor.view(torch.uint16).numpy(), dtype)
    return Latent(tensor.numpy(), dtype)


def to_tensor(array: npt.NDArray[Any], dtype: LatentDtype) -> Tensor:
    """The tensor, in its own dtype, that an array of latents at rest holds; shares its memory."""
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
