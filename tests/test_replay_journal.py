"""What the launcher writes down of heartbeats: amounts since the last look, new versions, skipped rows as they grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddil_dist.data.skipped import most_skipped, sentence
from ddil_dist.journal import Journal, read_journal
from ddil_dist.launch.replay_journal import AMOUNTS, FleetJournal, replay_fields
from ddil_dist.replay.unused import MOST_ACTORS
from ddil_dist.types import ReplayStats


def beat(amount: float, *, writer: str = "actor-0.1", version: int = 0, skipped: int | None = None) -> dict[str, Any]:
    data = None if skipped is None else {"num_rows": 50, "num_skipped": skipped}
    amounts = dict.fromkeys(AMOUNTS, amount)
    return {**amounts, "writer": writer, "version": version, "applied_at": 5.0, "batch_fill": 1.0, "data": data}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def observer(path: Path) -> FleetJournal:
    return FleetJournal(Journal(path))


def test_amounts_are_since_the_last_look_and_of_one_writer(observer: FleetJournal, path: Path) -> None:
    for now in (beat(3), beat(5, version=1), beat(5, version=1), beat(2, writer="actor-0.2", version=1)):
        assert observer.look({"actor-0": now}) == []
    lines = read_journal(path)
    assert [line["states"] for line in lines if line["kind"] == "rollout"] == [3, 2, 2]
    assert [line["version"] for line in lines if line["kind"] == "applied"] == [0, 1]
    assert observer.look({"actor-0": {"failed": "out of memory"}}) == ["out of memory"]


def test_the_journal_keeps_the_actors_whose_states_were_sampled_least() -> None:
    num = MOST_ACTORS + 4
    stats = ReplayStats(
        size=0, size_bytes=0, capacity=1, num_inserted=num * 100, num_sampled=0, num_refused=0,
        by_source={}, by_version={}, by_timestep={}, num_unused=7, inserted_by_timestep={999: num * 100},
        used_by_timestep={999: sum(range(num))}, inserted_by_actor={f"actor-{n}": 100 for n in range(num)},
        used_by_actor={f"actor-{n}": n for n in range(1, num)},
    )  # fmt: skip
    found = replay_fields(stats)["never_sampled"]
    assert (found["num"], found["live"]) == (num * 100 - sum(range(num)), 7)
    assert list(found["by_actor"]) == [f"actor-{n}" for n in range(MOST_ACTORS)]
    assert found["by_actor"]["actor-3"] == {"inserted": 100, "num": 97}


def test_skipped_rows_have_a_line_where_more_are_known(observer: FleetJournal, path: Path) -> None:
    observer.look({"a": beat(1), "b": beat(1, skipped=0)}, {"phase": "starting"})
    observer.look({"a": beat(1, skipped=2), "b": beat(1, skipped=3)}, {"data": {"num_rows": 50, "num_skipped": 1}})
    observer.look({"a": beat(2, skipped=2), "b": {"loading": True}}, {"data": {"num_rows": 50, "num_skipped": 3}})
    observer.look({}, {"data": {"num_rows": 50, "num_skipped": 4}})
    lines = [line for line in read_journal(path) if line["kind"] == "skipped"]
    assert [(line["num_skipped"], line["num_rows"]) for line in lines] == [(3, 50), (4, 50)]


def test_the_most_that_a_process_has_found_is_told() -> None:
    assert most_skipped([]) is most_skipped([{}, {"data": None}, {"data": {"num_rows": 9, "num_skipped": 0}}]) is None
    found = most_skipped([{"data": {"num_rows": 5000, "num_skipped": num}} for num in (3, 1200, 7)])
    assert found == {"num_rows": 5000, "num_skipped": 1200}
    assert sentence(found) == "1,200 of 5,000 rows of the data were skipped"
    by_reason = {"an image that does not decode": 1180, "no caption": 20}
    assert sentence(found | {"skipped": by_reason}) == (
        "1,200 of 5,000 rows of the data were skipped: 1,180 with an image that does not decode, 20 with no caption"
    )
    assert sentence({"num_rows": 2, "num_skipped": 1}) == "1 of 2 rows of the data was skipped"
