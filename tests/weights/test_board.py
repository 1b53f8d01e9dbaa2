"""The board without Ray: a version is found while it is being adopted, and one that cannot be adopted is dropped."""

from __future__ import annotations

import threading

import pytest

from ddil_dist.errors import WeightsError
from ddil_dist.types import WeightsVersion
from ddil_dist.weights.board import WeightBoard


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
