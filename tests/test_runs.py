"""How commands find a run, and what they say of one that they do not find."""

from __future__ import annotations

import argparse
import fcntl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ddil_dist import analyze, evaluate, scale, stop
from ddil_dist.errors import ConfigError
from ddil_dist.monitor.__main__ import main as monitor
from ddil_dist.report.__main__ import main as report
from ddil_dist.runs import CONFIG_FILE, FINISHED_FILE, LOCK_FILE, add_run, settle_run

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
    with (mine / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is trained and being exported and evaluated" in refusal(main, capsys, "mine", *more)
    (mine / FINISHED_FILE).write_text("3")
    told = refusal(main, capsys, "runs/mine", *more)
    assert f"run 'mine' has finished; its report is {mine / 'report.html'}" in told


@pytest.mark.parametrize("command", FINISHED)
def test_a_run_that_never_was_is_said_to_be_none(command: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(FINISHED[command], capsys, "nosuch")
    assert told.startswith(f"ddil_dist: no run 'nosuch' in {runs}; runs there: mine.")
    assert "--config" not in told


def test_a_report_is_made_of_a_run_by_its_name(runs: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    assert report(["mine"]) == 0
    assert capsys.readouterr().out.strip() == str(runs / "mine" / "report.html")
