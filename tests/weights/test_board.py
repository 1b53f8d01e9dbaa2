"""The board without Ray: a version is found while it is being adopted, and one that cannot be adopted is dropped."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ObjectStoreFullError

from ddil_dist.errors import WeightsError
from ddil_dist.types import WeightsVersion
from ddil_dist.weights import pack
from ddil_dist.weights.ray_store import NoRoomError, RayWeightStore, WeightBoard


def identity(version: int) -> WeightsVersion:
    return WeightsVersion(version, version / 100, digest=f"digest {version}", size_bytes=8, dtype="float32")


def test_readers_find_the_publishers_object_until_the_board_has_its_own() -> None:
    adopting, finish = threading.Event(), threading.Event()

    def adopt(held: str) -> str:
        adopting.set()
        assert finish.wait(20)
        return f"own {held}"

    board = WeightBoard(adopt)
    publishing = threading.Thread(target=board.publish, args=(identity(3), ["theirs"]))
    publishing.start()
    assert adopting.wait(20)
    assert board.newest() == identity(3)
    assert board.find(3) == [identity(3), "theirs"]
    assert publishing.is_alive(), "it is not acknowledged before the board owns it"
    finish.set()
    publishing.join(20)
    assert board.find(3) == [identity(3), "own theirs"]


def test_a_version_whose_publisher_died_on_the_way_gives_way_to_the_one_before() -> None:
    def adopt(held: str) -> str:
        if held == "lost":
            raise RuntimeError("the owner has died")
        return held

    board = WeightBoard(adopt)
    board.publish(identity(1), ["first"])
    with pytest.raises(RuntimeError, match="the owner has died"):
        board.publish(identity(2), ["lost"])
    assert board.newest() == identity(1)
    assert board.find(1) == [identity(1), "first"]
    assert board.find(2) == []
    board.publish(identity(2), ["again"])
    assert board.newest() == identity(2)


def test_a_repeated_publish_is_adopted_once_and_a_different_one_is_refused() -> None:
    adopted: list[str] = []

    def adopt(held: str) -> str:
        adopted.append(held)
        return held

    board = WeightBoard(adopt)
    for held in ("first", "retry"):
        board.publish(identity(5), [held])
    assert adopted == ["first"]
    with pytest.raises(WeightsError, match="version 5 is not newer than 5"):
        board.publish(WeightsVersion(5, 0.05, "another digest", 8, "float32"), ["other"])
    board.publish(identity(6), ["second"])
    board.publish(identity(7), ["third"])
    assert [board.find(version) for version in (5, 6, 7)] == [
        [],
        [identity(6), "second"],
        [identity(7), "third"],
    ]


@pytest.mark.parametrize(("room", "kept", "owned"), [(3, [1, 2], True), (2, [2], True), (1, [2], False)])
def test_where_room_is_short_fewer_versions_are_kept(room: int, kept: list[int], owned: bool) -> None:
    """room: for so many objects, a version's publisher's own among them."""
    board = WeightBoard(lambda held: f"own {held}")
    board.publish(identity(1), ["first"])

    def adopt(held: str) -> str:
        in_use = sum(bool(board.find(version)) for version in (1, 2))
        if in_use >= room:
            raise NoRoomError("full")
        return f"own {held}"

    board._adopt = adopt
    assert board.publish(identity(2), ["second"]) is owned
    assert [version for version in (1, 2) if board.find(version)] == kept
    assert board.find(2) == [identity(2), "own second" if owned else "second"]


class FullNode:
    """Ray on a node whose object store is full of older versions, and a board that has no room for copies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, room: int) -> None:
        self.taken: list[Any] = ["an older version"] * room
        self._room = room
        monkeypatch.setattr(ray, "put", self._put)
        monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
        methods = {name: SimpleNamespace(remote=getattr(self, name)) for name in ("publish", "make_room")}
        self.handle = SimpleNamespace(**methods)

    def _put(self, value: Any) -> Any:
        if len(self.taken) >= self._room:
            raise ObjectStoreFullError("full")
        self.taken.append(value)
        return value

    def publish(self, identity: WeightsVersion, held: list[Any]) -> bool:
        self.published = identity.version
        return False

    def make_room(self) -> None:
        self.taken.clear()


def test_older_versions_make_room_for_a_new_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = FullNode(monkeypatch, room=2)
    store = RayWeightStore(node.handle)
    packed = pack({"w": torch.ones(3)}, version=4, progress=0.0)
    store.publish(packed)
    assert node.published == 4
    assert node.taken == [packed]
    assert store._held is packed, "the board has no copy of its own"
    assert "no room for a second copy" in caplog.text


def test_a_store_without_room_for_a_single_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FullNode(monkeypatch, room=0)
    store = RayWeightStore(node.handle, timeout_s=0.3)
    with pytest.raises(WeightsError, match=r"no room for 12 bytes .* no other version is kept.*--object-store-memory"):
        store.publish(pack({"w": torch.ones(3)}, version=4, progress=0.0))
