"""The store of one process: versions rise, two are kept."""

from __future__ import annotations

import pytest
import torch

from ddil_dist.errors import WeightsError
from ddil_dist.weights import InMemoryWeightStore, PackedWeights, Packer, pack, unpack


def packed(version: int) -> PackedWeights:
    return pack({"w": torch.full((2,), float(version))}, version=version, progress=version / 100)


def test_an_empty_store_has_no_newest() -> None:
    assert InMemoryWeightStore().newest() is None


def test_the_newest_two_can_be_loaded_and_no_other() -> None:
    store = InMemoryWeightStore()
    for version in (0, 20, 40):
        store.publish(packed(version))
        assert store.newest() == packed(version).version
    assert unpack(store.load(40))["w"].tolist() == [40.0, 40.0]
    assert unpack(store.load(20))["w"].tolist() == [20.0, 20.0]
    for gone in (0, 30):
        with pytest.raises(WeightsError, match=rf"version {gone} is not kept; kept are \[20, 40\]"):
            store.load(gone)


@pytest.mark.parametrize("version", [19, 20])
def test_versions_rise_strictly(version: int) -> None:
    store = InMemoryWeightStore()
    store.publish(packed(20))
    with pytest.raises(WeightsError, match=rf"version {version} is not newer than 20"):
        store.publish(packed(version))
    newest = store.newest()
    assert newest is not None
    assert newest.version == 20


def test_what_is_published_is_a_read_only_copy() -> None:
    store, packer = InMemoryWeightStore(), Packer()
    for version in (1, 2):
        store.publish(packer.pack({"w": torch.full((2,), float(version))}, version=version, progress=0.0))
    for version in (1, 2):
        assert unpack(store.load(version))["w"].tolist() == [float(version)] * 2
        assert not store.load(version).buffer.flags.writeable
