"""The end of a run as others see it: watched and stopped from another shell, and finished by either command."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddil_dist import evaluate, stop
from ddil_dist.config import load_config
from ddil_dist.launch.__main__ import main as launch
from ddil_dist.launch.finish import is_finished
from ddil_dist.status import Status, StatusFile, is_asked_to_stop

TEACHER, BASELINE, BEFORE, STUDENT = (
    "teacher, 8 steps",
    "teacher, 4 steps",
    "student before, 4 steps",
    "student, 4 steps",
)


def at(policy: str, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Act once, when the evaluation has come to a policy."""
    show, acted = StatusFile.show, []

    def shown(self: StatusFile, status: Status) -> None:
        show(self, status)
        if status.policy == policy and not acted:
            acted.append(policy)
            act()

    monkeypatch.setattr(StatusFile, "show", shown)


def measured(path: Path) -> list[str]:
    return [policy["name"] for policy in json.loads((path / "results.json").read_text())["policies"]]


def test_an_evaluation_is_stopped_from_another_shell_and_finished_by_either_command(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        *tiny_overrides, "learner.updates=2", "evaluation.num_images=2", "evaluation.batch_size=1",
        "learner.trackers=[]", "learner.sample_every=0",
    ]  # fmt: skip
    config = load_config(None, overrides)
    path = config.run.path
    other = threading.Thread(target=stop.main, args=([str(path), "--wait", "60"],))

    def stop_elsewhere() -> None:
        other.start()
        deadline = time.monotonic() + 30
        while not is_asked_to_stop(path) and time.monotonic() < deadline:
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        at(BASELINE, stop_elsewhere, patch)
        assert launch(overrides) == 3
    other.join(30)
    said = capsys.readouterr()
    missing = f"has not measured: {BASELINE}; {BEFORE}; {STUDENT}; "
    assert f"its evaluation was stopped, and {missing}evaluate it again with: python -m ddil_dist.evaluate" in said.err
    assert f"tiny: stopping (evaluation of {BASELINE}, 2 of 8 images)" in said.out
    assert (
        f"tiny: ended; run 'tiny' is trained, and its student exported, but its evaluation was stopped, and {missing}"
        in (said.out)
    )
    assert measured(path) == [TEACHER]
    assert missing in (path / "report.html").read_text(encoding="utf-8")
    assert (path / "student" / "model_index.json").is_file()
    assert not is_finished(config)
    assert not is_asked_to_stop(path)

    assert evaluate.main([str(path)]) == 0
    assert is_finished(config)
    assert measured(path) == [TEACHER, BASELINE, BEFORE, STUDENT]
    assert "has not measured" not in (path / "report.html").read_text(encoding="utf-8")

    # Of a finished run nothing is lost where another evaluation of it is stopped, here by Ctrl-C.
    with monkeypatch.context() as patch:
        at(BASELINE, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        assert evaluate.main([str(path)]) == 3
    assert "ddil_dist: stopping the evaluation; press Ctrl-C again" in capsys.readouterr().err
    assert is_finished(config)
    assert measured(path) == [TEACHER, BASELINE, BEFORE, STUDENT]


def test_a_run_in_one_process_is_stopped_from_another_shell(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = load_config(None, tiny_overrides).run.path
    show = StatusFile.show
    other = threading.Thread(target=stop.main, args=([str(path), "--wait", "60"],))

    def shown(self: StatusFile, status: Status) -> None:
        show(self, status)
        if status.done == 2:
            other.start()
            deadline = time.monotonic() + 30
            while not is_asked_to_stop(path) and time.monotonic() < deadline:
                time.sleep(0.01)

    monkeypatch.setattr(StatusFile, "show", shown)
    assert launch(tiny_overrides) == 130
    other.join(30)
    assert "tiny: ended; run 'tiny' has stopped; the same launch resumes it" in capsys.readouterr().out
    assert [each.name for each in (path / "checkpoints").iterdir()] == ["update_00000002"]


def test_a_run_without_a_student_is_not_evaluated(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = load_config(None, tiny_overrides).run.path
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("{}\n")
    assert evaluate.main([str(path)]) == 2
    assert "has no student to evaluate; the same launch makes it" in capsys.readouterr().err
