"""A checkpoint before an elastic group grows, without Ray and Redis."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.execution.controller.state import ResizingState, RunningState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from ddil_dist.config import RunConfig
from ddil_dist.errors import EnvironmentFailure
from learner import growth, worker
from learner.checkpoint import CheckpointStore
from learner.growth import wanted_checkpoint
from learner.worker import CheckpointBeforeGrowth
from tests.learner.support import learner_config, make_trainer


class Control:
    """The keys of one run."""

    def __init__(self) -> None:
        self.wanted = self.taken = self.away = False
        self.within_s = 0.0

    def ask_for_checkpoint(self, *, within_s: float) -> None:
        self.wanted, self.within_s = True, within_s

    def checkpoint_wanted(self) -> bool:
        if self.away:
            raise EnvironmentFailure("Redis cannot be reached")
        return self.wanted

    def checkpoint_taken(self) -> None:
        self.wanted, self.taken = False, True

    def learner_status(self) -> dict[str, Any]:
        return {"workers": 2}

    def close(self) -> None:
        pass


def test_one_that_is_asked_for_is_written_at_once_and_then_told_of(tmp_path: Path) -> None:
    control = Control()
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    config = learner_config(updates=9, checkpoint_every=8, keep_checkpoints=9)
    trainer = make_trainer(
        tmp_path,
        config=config,
        is_checkpoint_wanted=wanted_checkpoint(control, store),  # type: ignore[arg-type]
    )
    for _ in range(3):
        trainer._step()
    assert store.updates() == []
    control.ask_for_checkpoint(within_s=60)
    trainer._step()
    assert store.updates() == [3], "after three updates, before the fourth"
    trainer._step()
    assert control.taken
    assert not control.wanted
    trainer._step()
    assert store.updates() == [3]
    control.away = True
    trainer._step()
    assert trainer.run()
    assert store.updates() == [3, 8, 9]


def test_a_learner_that_waits_for_states_writes_one_too(tmp_path: Path) -> None:
    control = Control()
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    trainer = make_trainer(tmp_path, is_checkpoint_wanted=wanted_checkpoint(control, store))  # type: ignore[arg-type]
    trainer._step()
    control.ask_for_checkpoint(within_s=60)
    for _ in range(2):
        trainer._listen(ready=False, stop=False, source=trainer._source.state_dict())
    assert store.updates() == [1]
    assert control.taken


def resizing(num_workers: int) -> ResizingState:
    return ResizingState(scaling_decision=ResizeDecision(num_workers=num_workers, resources_per_worker={}))


@pytest.mark.parametrize(("state", "waits"), [(resizing(3), True), (resizing(1), False), (RunningState(), False)])
def test_rays_controller_waits_for_it_before_the_group_grows(
    state: Any, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            control.checkpoint_taken()

    monkeypatch.setattr(worker, "connect", lambda config: None)
    monkeypatch.setattr(worker, "RunControl", lambda client, run: control)
    monkeypatch.setattr(growth, "time", SimpleNamespace(sleep=sleep))
    config = RunConfig()
    CheckpointBeforeGrowth(config).after_controller_state_update(RunningState(), state)
    assert len(slept) == (3 if waits else 0)
    assert control.within_s == (config.deadlines.learner_stop_s if waits else 0.0)


def test_an_outage_of_redis_does_not_hold_up_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(config: object) -> None:
        raise EnvironmentFailure("Redis cannot be reached")

    monkeypatch.setattr(worker, "connect", away)
    CheckpointBeforeGrowth(RunConfig()).after_controller_state_update(RunningState(), resizing(3))
    assert "no checkpoint before the learner grows: Redis cannot be reached" in capsys.readouterr().out
