"""Packed weights: round trips in every dtype, and damage that the digest sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_dist.errors import WeightsError
from ddil_dist.weights import PackedWeights, pack, unpack


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(3, 2, 3, 3, generator=generator),
        "conv.bias": torch.randn(3, generator=generator),
        "scale": torch.tensor(2.5),
        "strided": torch.randn(4, 6, generator=generator).t(),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_back_as_they_were_cast(dtype: str) -> None:
    original = weights()
    packed = pack(original, version=3, progress=0.25, dtype=dtype)
    back = unpack(packed)
    assert list(back) == list(original)
    for name, tensor in original.items():
        assert torch.equal(back[name], tensor.to(getattr(torch, dtype)))
    assert packed.version.version == 3
    assert packed.version.progress == 0.25
    assert packed.version.size_bytes == packed.buffer.nbytes == 82 * (4 if dtype == "float32" else 2)
    assert packed.version.dtype == dtype


def test_packing_copies() -> None:
    original = weights()
    packed = pack(original, version=0, progress=0.0)
    original["conv.bias"].zero_()
    assert unpack(packed)["conv.bias"].abs().min() > 0


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 82 * 4 - 1), bit=st.integers(0, 7))
def test_one_flipped_bit_is_torn(position: int, bit: int) -> None:
    packed = pack(weights(), version=1, progress=0.0)
    packed.buffer[position] ^= 1 << bit
    with pytest.raises(WeightsError, match=r"version 1: .* torn and was not applied"):
        unpack(packed)


def test_a_layout_or_dtype_that_is_not_the_buffers_is_torn() -> None:
    packed = pack(weights(), version=1, progress=0.0, dtype="float16")
    swapped = (packed.layout[1], packed.layout[0], *packed.layout[2:])
    with pytest.raises(WeightsError):
        unpack(replace(packed, layout=swapped))
    with pytest.raises(WeightsError):
        unpack(replace(packed, version=replace(packed.version, dtype="bfloat16")))
    with pytest.raises(WeightsError):
        unpack(replace(packed, buffer=packed.buffer[:-2]))


def test_a_read_only_buffer_unpacks_without_a_copy() -> None:
    packed = pack(weights(), version=1, progress=0.0)
    shared = np.frombuffer(packed.buffer.tobytes(), np.uint8)
    assert not shared.flags.writeable
    back = unpack(PackedWeights(packed.version, packed.layout, shared))
    assert torch.equal(back["conv.weight"], weights()["conv.weight"])
    assert back["conv.weight"].data_ptr() == shared.ctypes.data


def test_the_digest_is_of_the_content() -> None:
    one, same = (pack(weights(), version=v, progress=0.0).version.digest for v in (1, 2))
    other = pack({**weights(), "scale": torch.tensor(2.0)}, version=1, progress=0.0).version.digest
    renamed = pack({f"x{name}": tensor for name, tensor in weights().items()}, version=1, progress=0.0).version.digest
    assert one == same
    assert len({one, other, renamed}) == 3
