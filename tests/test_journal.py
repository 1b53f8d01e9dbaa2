"""The journal: whole lines in order, whatever a kill tore."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_dist.journal import Journal, read_journal


def entries(path: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in entry.items() if key != "time"} for entry in read_journal(path)]


def test_what_is_written_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    journal = Journal(path)
    journal.write("update", update=1, loss=0.5, sources={"STUDENT": 3})
    journal.write("publish", version=2)
    assert entries(path) == [
        {"kind": "update", "update": 1, "loss": 0.5, "sources": {"STUDENT": 3}},
        {"kind": "publish", "version": 2},
    ]
    assert all(isinstance(entry["time"], float) for entry in read_journal(path))


def test_another_life_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for life in range(3):
        journal = Journal(path)
        journal.write("start", life=life)
    assert [entry["life"] for entry in entries(path)] == [0, 1, 2]
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_left_out_and_costs_no_other(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.write("a", n=1)
    journal.write("b", n=2)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [entry["n"] for entry in entries(path)] == ([1, 2] if cut == 1 else [1])
    resumed = Journal(path)
    resumed.write("c", n=3)
    assert [entry["n"] for entry in entries(path)] == ([1, 2, 3] if cut == 1 else [1, 3])


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=20))
def test_any_text_stays_on_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    journal = Journal(path)
    journal.write("note", text=text)
    journal.write("note", text="after")
    assert [entry["text"] for entry in entries(path)] == [text, "after"]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_value_that_is_no_json_number_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.write("update", loss=float("nan"))
    journal.write("update", loss=1.0)
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1.0]


def test_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "metrics.jsonl") == []


@contextmanager
def full_disk(path: Path, *, room: int) -> Iterator[None]:
    """The file can grow by `room` bytes only."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [0, 10])
def test_a_line_that_finds_no_room_is_left_out_with_one_warning(
    tmp_path: Path, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write("update", number=1)
    with full_disk(tmp_path / "journal", room=room):
        for number in (2, 3):
            journal.write("update", number=number)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "journal cannot be written" in told[0]
    journal.write("update", number=4)
    assert caplog.records[-1].getMessage().endswith("is written again; 2 lines are missing")
    journal.write("update", number=5)
    assert [entry["number"] for entry in read_journal(tmp_path / "journal")] == [1, 4, 5]
    assert len(caplog.records) == 2
