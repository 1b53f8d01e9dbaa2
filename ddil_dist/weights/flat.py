"""A network's published weights as one contiguous buffer with its layout and digest, and back into a network.

What is shipped are the trained tensors (`published_names`); `Packer` copies them into the buffer, `apply` out of it.

The digest guards against torn copies and mixed-up layouts, not against forgery: XXH3 over the digests of the buffer's
chunks, so that a chunk is hashed while it is still in the cache that copied it, and by as many threads as help.
"""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from ddil_dist.errors import WeightsError
from ddil_dist.models.denoiser import torch_dtype
from ddil_dist.types import LatentDtype, WeightsVersion

Item = TypeVar("Item")
Result = TypeVar("Result")
Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes in buffer order."""

CHUNK_BYTES = 4 << 20
MAX_THREADS = 4


@dataclass(frozen=True)
class PackedWeights:
    """One published version. `buffer` is 1-D uint8 and read-only; all tensors in it have `version.dtype`."""

    version: WeightsVersion
    layout: Layout
    buffer: npt.NDArray[np.uint8]


class Packer:
    """Packs version after version into one buffer of its own: fresh memory costs several times the copy.

    What `pack` returned is overwritten by the next `pack`; a store's `publish` has copied it by then.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def pack(
        self, weights: Mapping[str, Tensor], *, version: int, progress: float, dtype: LatentDtype = "float32"
    ) -> PackedWeights:
        """Copy a state dict into the flat buffer. Values are cast to `dtype`, and fetched from their device."""
        layout = layout_of(weights)
        itemsize = torch_dtype(dtype).itemsize
        starts = [0, *accumulate(tensor.numel() for tensor in weights.values())]
        if starts[-1] == 0:
            raise WeightsError(f"weights version {version}: {len(weights)} tensors hold no value; nothing to publish")
        memory = self._reserve(starts[-1] * itemsize, pinned=any(tensor.is_cuda for tensor in weights.values()))
        flat = memory.view(torch_dtype(dtype))
        sources = [tensor.detach().reshape(-1) for tensor in weights.values()]
        buffer = memory.numpy()
        buffer.flags.writeable = False

        def copy_and_hash(chunk: slice) -> bytes:
            _gather(sources, starts, flat, chunk.start // itemsize, chunk.stop // itemsize)
            return xxh3_128_digest(buffer.data[chunk])

        digest = _combine(layout, dtype, in_threads(copy_and_hash, _chunks(buffer.nbytes)))
        identity = WeightsVersion(version, progress, digest, size_bytes=buffer.nbytes, dtype=dtype)
        return PackedWeights(identity, layout, buffer)

    def _reserve(self, size: int, *, pinned: bool) -> Tensor:
        if self._memory.numel() != size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._memory


def pack(
    weights: Mapping[str, Tensor], *, version: int, progress: float, dtype: LatentDtype = "float32"
) -> PackedWeights:
    """Copy a state dict into a flat buffer that is the result's alone. Values are cast to `dtype`."""
    return Packer().pack(weights, version=version, progress=progress, dtype=dtype)


def unpack(packed: PackedWeights) -> dict[str, Tensor]:
    """The state dict, as views of the buffer: copy before writing. Raises WeightsError if the buffer is torn."""
    version, buffer = packed.version, packed.buffer
    digests = in_threads(lambda chunk: xxh3_128_digest(buffer.data[chunk]), _chunks(buffer.nbytes))
    if _combine(packed.layout, version.dtype, digests) != version.digest:
        raise WeightsError(
            f"weights version {version.version}: {buffer.nbytes} bytes do not hash to {version.digest}; "
            "the copy is torn and was not applied; fetch it again, or wait for the next version"
        )
    flat = _as_tensor(buffer).view(torch_dtype(version.dtype))
    weights, start = {}, 0
    for name, shape in packed.layout:
        size = prod(shape)
        weights[name] = flat[start : start + size].view(shape)
        start += size
    return weights


def published_names(network: nn.Module) -> tuple[str, ...]:
    """Names, in the state dict, of what must be shipped so that another copy of the network can follow this one.

    The trained parameters (all of them where none is frozen or none is trained; an adapter's alone where it is trained
    on a frozen network), and every floating-point buffer, since a buffer does not say whether training moves it.
    Integers, such as counts of batches, stay: they would not survive the cast, and inference does not read them.
    Ask before `requires_grad` is changed for any other reason than what is trained.
    """
    state = network.state_dict(keep_vars=True)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    trained = {name for name in parameters & state.keys() if state[name].requires_grad}
    left_out = parameters - trained if trained else set()
    return tuple(name for name, tensor in _floating(state).items() if name not in left_out)


def published_weights(network: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors to pack, by name: `names`, or `published_names(network)`. They share the network's memory."""
    state = _floating(network.state_dict())
    return {name: state[name] for name in (published_names(network) if names is None else names)}


def apply(packed: PackedWeights, network: nn.Module, names: Collection[str] | None = None) -> None:
    """Copy a version into the network's tensors in place, cast to their dtype, on their device.

    names: what must have been shipped, no more and no less; `published_names(network)` if None. Raises WeightsError,
    before the first tensor is written, if a name or shape differs or if the buffer is torn.
    """
    targets = published_weights(network, names)
    _compare(packed, targets)
    weights = unpack(packed)
    order = sorted(weights, key=lambda name: -weights[name].numel())  # the largest first: threads end together
    in_threads(lambda name: targets[name].copy_(weights[name]), order)


def layout_of(weights: Mapping[str, Tensor]) -> Layout:
    """Names and shapes, in order."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in weights.items())


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of every item, in their order, on a few threads: for copies and hashes, which release the GIL."""
    num = min(MAX_THREADS, os.cpu_count() or 1, len(items))
    if num <= 1:
        return [work(item) for item in items]
    results: dict[int, Result] = {}
    remaining = iter(list(enumerate(items)))  # a list's iterator hands each item out once, to whichever thread asks

    def drain(shared: Iterable[tuple[int, Item]]) -> None:
        for index, item in shared:
            results[index] = work(item)

    with ThreadPoolExecutor(num - 1) as pool:
        others = [pool.submit(drain, remaining) for _ in range(num - 1)]
        drain(remaining)
        for other in others:
            other.result()
    return [results[index] for index in range(len(items))]


def _gather(sources: Sequence[Tensor], starts: Sequence[int], flat: Tensor, first: int, last: int) -> None:
    """Copy elements first..last of the concatenated `sources`, which begin at `starts`, to their place in `flat`."""
    index = bisect_right(starts, first) - 1
    while first < last:
        begin, stop = first - starts[index], min(last, starts[index + 1])
        flat[first:stop].copy_(sources[index][begin : begin + stop - first])
        first, index = stop, index + 1


def _chunks(size: int) -> list[slice]:
    return [slice(start, min(size, start + CHUNK_BYTES)) for start in range(0, size, CHUNK_BYTES)]


def _combine(layout: Layout, dtype: LatentDtype, digests: Sequence[bytes]) -> str:
    return xxh3_128_hexdigest(repr((layout, dtype)).encode() + b"".join(digests))


def _as_tensor(buffer: npt.NDArray[np.uint8]) -> Tensor:
    """The same memory as a tensor. Published arrays are read-only, of which torch warns; nobody writes here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(buffer)


def _compare(packed: PackedWeights, targets: dict[str, Tensor]) -> None:
    def refuse(difference: str) -> WeightsError:
        return WeightsError(
            f"weights version {packed.version.version}: {difference}; nothing was applied: the learner and this "
            "process must build the student from the same configuration and release"
        )

    shipped = dict(packed.layout)
    for name, shape in packed.layout:
        if name not in targets:
            raise refuse(f"{name} {list(shape)} is shipped, but the network does not take it")
        if tuple(targets[name].shape) != shape:
            raise refuse(f"{name} is shipped as {list(shape)}, but is {list(targets[name].shape)} in the network")
    for name, target in targets.items():
        if name not in shipped:
            raise refuse(f"{name} {list(target.shape)} of the network is not shipped")


def _floating(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
