"""How commands find a run, and what they say of one that they do not find."""

from __future__ import annotations

import argparse
import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ddil_dist import analyze, evaluate, scale, stop
from ddil_dist.attach import redis_of
from ddil_dist.errors import ConfigError
from ddil_dist.locks import LOCK_FILE
from ddil_dist.monitor.__main__ import main as monitor
from ddil_dist.report.__main__ import main as report
from ddil_dist.runs import CONFIG_FILE, FINISHED_FILE, add_run, settle_run
from ddil_dist.status import Status, StatusFile

Main = Callable[[Sequence[str]], int]
LIVING: dict[str, tuple[Main, tuple[str, ...]]] = {
    "monitor": (monitor, ("--json",)),
    "scale": (scale.main, ("--rollouts", "1")),
    "stop": (stop.main, ()),
}
FINISHED: dict[str, Main] = {"evaluate": evaluate.main, "analyze": analyze.main}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with runs/mine, which is not going on."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    (path / CONFIG_FILE).write_text("{}\n")
    return tmp_path / "runs"


def settled(*words: str, overrides: bool = False) -> tuple[Path, list[str]]:
    parser = argparse.ArgumentParser()
    add_run(parser, overrides=overrides)
    options = parser.parse_args(words)
    return settle_run(options), options.overrides


def test_a_run_is_named_in_every_way_alike(runs: Path) -> None:
    ways: list[tuple[str, ...]] = [
        ("mine",), ("runs/mine",), ("--run", "mine"), ("--run", "runs/mine"), (str(runs / "mine"),),
        ("mine", "--directory", "runs"), ("--run", "mine", "--directory", str(runs)), ("mine", "--run", "mine"),
    ]  # fmt: skip
    assert {settled(*way)[0] for way in ways} == {runs / "mine"}
    assert settled()[0] == runs / "demo"
    assert settled("run.seed=1", "mine", "a.b=2", overrides=True) == (runs / "mine", ["run.seed=1", "a.b=2"])
    with pytest.raises(ConfigError, match="several runs are named"):
        settled("mine", "yours")
    with pytest.raises(ConfigError, match=r"'run\.seed=1' is no run"):
        settled("mine", "run.seed=1")


def refusal(main: Main, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(words) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", LIVING)
def test_what_has_become_of_a_run_is_said(command: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, more = LIVING[command]
    mine = runs / "mine"
    assert refusal(main, capsys, "nosuch", *more).startswith(
        f"ddil_dist: no run 'nosuch' in {runs}; runs there: mine. Start one with python -m ddil_dist.launch"
    )
    assert "run 'mine' has stopped; the same launch resumes it" in refusal(main, capsys, "mine", *more)
    status = StatusFile(mine)
    status.show(Status("failed", reason="a network is broken"))
    told = refusal(main, capsys, "mine", *more)
    assert "'mine' is trained, and its student exported, but its evaluation failed: a network is broken;" in told
    assert f"python -m ddil_dist.evaluate {mine} evaluates it again, as does the same launch" in told
    status.show(Status("stopped", unmeasured=("student, 4 steps",)))
    assert "was stopped, and has not measured: student, 4 steps; python" in refusal(main, capsys, "mine", *more)
    status.show(Status("evaluation"))
    assert "but it was ended during its evaluation; python" in refusal(main, capsys, "mine", *more)
    (mine / FINISHED_FILE).write_text("3")
    told = refusal(main, capsys, "runs/mine", *more)
    assert f"run 'mine' has finished; its report is {mine / 'report.html'}" in told


@contextmanager
def going_on(path: Path) -> Iterator[None]:
    """The run's launcher, as far as others see it."""
    with (path / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_run_in_its_evaluation_has_nothing_to_scale(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with going_on(runs / "mine"):
        assert "run 'mine' is starting, or between its" in refusal(scale.main, capsys, "mine", "--rollouts", "1")
        StatusFile(runs / "mine").show(Status("evaluation", policy="student, 4 steps", done=30, total=40))
        told = refusal(scale.main, capsys, "mine", "--rollouts", "1")
        assert "no rollout actors now (evaluation of student, 4 steps, 30 of 40 images)" in told


def test_a_run_in_its_evaluation_is_watched(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with going_on(runs / "mine"):
        StatusFile(runs / "mine").show(Status("evaluation", policy="teacher, 8 steps", done=30, total=40, left_s=9.5))
        assert monitor(["mine", "--json", "--interval", "0.05"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["process"] == {
            "phase": "evaluation", "policy": "teacher, 8 steps", "done": 30, "total": 40, "left_s": 9.5,
        }  # fmt: skip
        assert (report["replay"], report["learner"], report["stop_reason"]) == (None, {"phase": "evaluation"}, None)
        assert report["bottleneck"] == "evaluation of teacher, 8 steps, 30 of 40 images"


def test_a_curriculum_is_watched_at_its_stage(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = runs / "mine" / "mine_stage_2"
    stage.mkdir()
    with going_on(runs / "mine"), going_on(stage):
        StatusFile(stage).show(Status("training", done=3, total=9))
        assert monitor(["mine", "--json", "--interval", "0.05"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["run"], report["learner"]["update"], report["learner"]["total_updates"]) == (
            "mine_stage_2",
            3,
            9,
        )


def test_who_watches_a_run_sees_it_end(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = runs / "mine"
    with going_on(mine):
        StatusFile(mine).show(Status("evaluation", policy="student, 4 steps", done=30, total=40))
        watching = threading.Thread(target=monitor, args=(["mine", "--watch", "--interval", "0.05"],))
        watching.start()
        seen = ""
        deadline = time.monotonic() + 20
        while "30 of 40 images" not in seen and time.monotonic() < deadline:
            seen += capsys.readouterr().out
            time.sleep(0.02)
        assert "30 of 40 images" in seen
        (mine / FINISHED_FILE).write_text("3")
    watching.join(20)
    assert not watching.is_alive()
    assert f"run 'mine' has finished; its report is {mine / 'report.html'}" in capsys.readouterr().err


def test_the_deadlines_of_a_run_are_those_that_it_was_started_with(runs: Path) -> None:
    options = argparse.Namespace(url=["redis://127.0.0.1:1"], username="me", password_file=None)
    assert redis_of(runs / "mine", options).answer_timeout_s == 10
    (runs / "mine" / CONFIG_FILE).write_text("redis: {url: redis://elsewhere:2, username: it, answer_timeout_s: 33}")
    nobody = argparse.Namespace(url=None, username=None, password_file=None)
    assert redis_of(runs / "mine", nobody).urls == ("redis://elsewhere:2",), "the Redis that it was started with"
    found = redis_of(runs / "mine", options)
    assert (found.urls, found.username, found.answer_timeout_s) == (("redis://127.0.0.1:1",), "me", 33)
    (runs / "mine" / CONFIG_FILE).write_text("of: another version\n")
    assert redis_of(runs / "mine", options).answer_timeout_s == 10


@pytest.mark.parametrize("command", FINISHED)
def test_a_run_that_never_was_is_said_to_be_none(command: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(FINISHED[command], capsys, "nosuch")
    assert told.startswith(f"ddil_dist: no run 'nosuch' in {runs}; runs there: mine.")
    assert "--config" not in told


def test_a_report_is_made_of_a_run_by_its_name(runs: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    assert report(["mine"]) == 0
    assert capsys.readouterr().out.strip() == str(runs / "mine" / "report.html")
