"""A state dict as one contiguous buffer with its layout and digest, and back without a copy."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddil_dist.errors import WeightsError
from ddil_dist.models.denoiser import torch_dtype
from ddil_dist.types import LatentDtype, WeightsVersion

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes in buffer order."""


@dataclass(frozen=True)
class PackedWeights:
    """One published version. `buffer` is 1-D uint8, immutable once made; all tensors in it have `version.dtype`."""

    version: WeightsVersion
    layout: Layout
    buffer: npt.NDArray[np.uint8]


def pack(
    weights: Mapping[str, Tensor], *, version: int, progress: float, dtype: LatentDtype = "float32"
) -> PackedWeights:
    """Copy a state dict into one flat buffer. Values are cast to `dtype`."""
    layout = tuple((name, tuple(tensor.shape)) for name, tensor in weights.items())
    flat = torch.cat([tensor.detach().to("cpu", torch_dtype(dtype)).flatten() for tensor in weights.values()])
    buffer = flat.view(torch.uint8).numpy()
    identity = WeightsVersion(
        version=version,
        progress=progress,
        digest=_digest(layout, dtype, buffer),
        size_bytes=buffer.nbytes,
        dtype=dtype,
    )
    return PackedWeights(identity, layout, buffer)


def unpack(packed: PackedWeights) -> dict[str, Tensor]:
    """The state dict, as views of the buffer: copy before writing. Raises WeightsError if the buffer is torn."""
    version = packed.version
    if _digest(packed.layout, version.dtype, packed.buffer) != version.digest:
        raise WeightsError(
            f"weights version {version.version}: {packed.buffer.nbytes} bytes do not hash to {version.digest}; "
            "the copy is torn and was not applied"
        )
    flat = _as_tensor(packed.buffer).view(torch_dtype(version.dtype))
    weights, start = {}, 0
    for name, shape in packed.layout:
        size = int(np.prod(shape, dtype=np.int64))
        weights[name] = flat[start : start + size].view(shape)
        start += size
    return weights


def _as_tensor(buffer: npt.NDArray[np.uint8]) -> Tensor:
    """The same memory as a tensor. Arrays in shared memory are read-only, of which torch warns; nobody writes here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(buffer)


def _digest(layout: Layout, dtype: LatentDtype, buffer: npt.NDArray[np.uint8]) -> str:
    digest = hashlib.blake2b(repr((layout, dtype)).encode(), digest_size=16)
    digest.update(buffer.data)
    return digest.hexdigest()
