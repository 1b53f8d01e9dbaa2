"""Reading a run's directory: torn and repeated lines, missing and broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddil_dist.errors import EnvironmentFailure
from ddil_dist.report.record import read_run


def write_lines(run_dir: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def test_an_empty_directory_is_an_empty_record(tmp_path: Path) -> None:
    run = read_run(tmp_path)
    assert (run.config, run.results, run.samples, run.updates, list(run.problems)) == (None, None, None, (), [])


def test_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="is no directory"):
        read_run(tmp_path / "missing")


def test_torn_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    lines = '{"kind": "upd\n["no mapping"]\n{"kind": 3}\n{"kind": "update", "update": 2}\n{"kind": "upd'
    write_lines(tmp_path, [{"kind": "update", "update": 1}], tail=lines)
    assert [line["update"] for line in read_run(tmp_path).updates] == [1, 2]


def test_the_journals_of_learner_and_launcher_are_read_together(tmp_path: Path) -> None:
    write_lines(tmp_path, [{"kind": "update", "update": 1}])
    (tmp_path / "events.jsonl").write_text('{"kind": "phase", "name": "training", "seconds": 2.0}\n')
    run = read_run(tmp_path)
    assert (len(run.updates), run.of("phase")[0]["name"]) == (1, "training")


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = [{"kind": "update", "update": n, "loss": 1.0} for n in (1, 2, 3, 4)]
    again = [{"kind": "update", "update": n, "loss": 2.0} for n in (3,)]
    versions = [{"kind": "publish", "version": v, "digest": d} for v, d in ((0, "a"), (2, "b"), (4, "c"), (2, "d"))]
    write_lines(tmp_path, [*first, *versions, *again])
    run = read_run(tmp_path)
    assert [(line["update"], line["loss"]) for line in run.updates] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert [line["digest"] for line in run.of("publish")] == ["a", "d"]


def test_broken_files_are_problems_and_do_not_stop_the_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("learner:\n  update: 3\n")
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "grid.json").write_text('{"captions": ["a"], "rows": [{"label": "x", "file": "x.png"}]}')
    run = read_run(tmp_path)
    assert run.config is None
    assert run.config_text is not None
    problems = " ".join(run.problems)
    assert "learner.update: unknown key" in problems
    assert "not a results file" in problems
    assert "not readable as a sample grid" in problems
