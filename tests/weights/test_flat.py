"""Packed weights: round trips in every dtype, and damage that the digest sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_dist.errors import WeightsError
from ddil_dist.weights import PackedWeights, Packer, flat, pack, unpack


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
    buffer = packed.buffer.copy()
    buffer[position] ^= 1 << bit
    packed = replace(packed, buffer=buffer)
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


def test_nobody_writes_into_what_was_packed() -> None:
    packed = pack(weights(), version=1, progress=0.0)
    with pytest.raises(ValueError, match="read-only"):
        packed.buffer[0] = 1


def test_a_packer_packs_again_into_the_same_memory() -> None:
    packer = Packer()
    first = packer.pack(weights(), version=1, progress=0.0)
    second = packer.pack({name: tensor + 1 for name, tensor in weights().items()}, version=2, progress=0.0)
    assert first.buffer.ctypes.data == second.buffer.ctypes.data
    assert torch.equal(unpack(second)["conv.weight"], weights()["conv.weight"] + 1)
    with pytest.raises(WeightsError, match=r"version 1: .* torn"):
        unpack(first)
    smaller = packer.pack({"scale": torch.tensor(3.0)}, version=3, progress=0.0)
    assert {name: tensor.item() for name, tensor in unpack(smaller).items()} == {"scale": 3.0}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    chunk=st.sampled_from([4, 16, 36, 4096]),
    threads=st.sampled_from([1, 3]),
)
def test_chunks_and_threads_change_nothing_but_the_digest(sizes: list[int], chunk: int, threads: int) -> None:
    original = {f"w{i}": torch.arange(size, dtype=torch.float32) + 100 * i for i, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "CHUNK_BYTES", chunk)
        patch.setattr(flat, "MAX_THREADS", threads)
        patch.setattr("os.cpu_count", lambda: 4)
        packed = pack(original, version=1, progress=0.0)
        wanted = b"".join(tensor.numpy().tobytes() for tensor in original.values())
        assert packed.buffer.tobytes() == wanted
        for name, tensor in unpack(packed).items():
            assert torch.equal(tensor, original[name])
        patch.setattr(flat, "MAX_THREADS", 1)
        assert pack(original, version=1, progress=0.0).version.digest == packed.version.digest


def test_weights_without_a_value_are_refused() -> None:
    for empty in ({}, {"w": torch.empty(0, 3)}):
        with pytest.raises(WeightsError, match="nothing to publish"):
            pack(empty, version=1, progress=0.0)


def test_work_in_threads_keeps_its_order_and_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert flat.in_threads(lambda item: item * item, range(50)) == [item * item for item in range(50)]
    assert flat.in_threads(lambda item: item, []) == []

    def fails(item: int) -> int:
        if item == 17:
            raise WeightsError("item 17")
        return item

    with pytest.raises(WeightsError, match="item 17"):
        flat.in_threads(fails, range(50))


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
