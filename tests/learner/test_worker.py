"""What a learner's worker does about failures and outages, without Ray and Redis."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ddil_dist.config import RunConfig
from ddil_dist.errors import EnvironmentFailure, WaitTimeoutError
from learner import worker


class Supervisor:
    """Hears by calls as an actor does; `asked` is what it answers about stopping."""

    def __init__(self, *, asked: bool = False, away: bool = False) -> None:
        self.heard: list[str] = []
        self._away = away
        self.learner_failed = SimpleNamespace(remote=self.heard.append)
        self.is_asked_to_stop = SimpleNamespace(remote=lambda: asked)

    def get(self, answer: Any, *, timeout: float) -> Any:
        if self._away:
            raise ray.exceptions.GetTimeoutError
        return answer


class Silent:
    """The control keys of a run whose Redis is away."""

    def stop_requested(self) -> bool:
        raise EnvironmentFailure("Redis cannot be reached")


def fails(settings: dict[str, Any]) -> worker.Outcome:
    raise WaitTimeoutError("a sample waited 300.0 s for the replay server")


@pytest.mark.parametrize("away", [False, True])
def test_why_a_worker_fails_is_told_without_redis(away: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Supervisor(away=away)
    monkeypatch.setattr(worker, "_work", fails)
    monkeypatch.setattr(ray, "get", supervisor.get)
    outcome = worker.train_worker({"config": RunConfig(), "supervisor": supervisor})
    reason = "WaitTimeoutError: a sample waited 300.0 s for the replay server"
    assert outcome == worker.Outcome("failed", reason)
    assert supervisor.heard == [reason]


@pytest.mark.parametrize(("asked", "away", "stops"), [(True, False, True), (False, False, False), (True, True, False)])
def test_a_request_to_stop_reaches_a_learner_whose_redis_is_away(
    asked: bool, away: bool, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Supervisor(asked=asked, away=away)
    monkeypatch.setattr(ray, "get", supervisor.get)
    assert worker._is_asked_to_stop(Silent(), supervisor, timeout_s=1.0) is stops  # type: ignore[arg-type]


ROLLS = {"pid": 1, "age_s": 1.0}
FAILED = {"failed": "actor-0.2 died after 0 s: its node is dead", "age_s": 1.0}


@pytest.mark.parametrize(
    ("fleet", "beats", "away"),
    [
        ({"wanted": 2, "running": 2}, [ROLLS], False),
        ({"wanted": 0, "running": 0}, [ROLLS], True),
        ({"wanted": 2, "running": 0, "waiting_for_a_place": 2}, [ROLLS], True),
        ({"wanted": 2, "running": 2}, [{"loading": True, "age_s": 1.0}], True),
        ({"wanted": 2, "running": 2}, [{**ROLLS, "age_s": 9.0}] * 2, True),
        ({"wanted": 2, "running": 2}, [{**ROLLS, "age_s": 90.0}] * 2, False),
        ({"wanted": 2, "running": 0, "backing_off": 2}, [{**FAILED, "deaths": 2}] * 2, True),
        ({"wanted": 2, "running": 0, "backing_off": 2}, [{**FAILED, "deaths": 9}] * 2, False),
        ({"wanted": 2, "running": 1, "backing_off": 1}, [ROLLS, {**FAILED, "deaths": 2}], False),
    ],
    ids=[
        "all run",
        "paused",
        "no place",
        "loading",
        "all silent at once",
        "all silent for long",
        "tried again soon",
        "dying again and again",
        "one runs, and another is tried again",
    ],
)
def test_states_are_awaited_while_there_is_a_reason(
    fleet: dict[str, int], beats: list[dict[str, Any]], away: bool
) -> None:
    found = {f"actor-{index}": {**beat, "time": time.time() - beat["age_s"]} for index, beat in enumerate(beats)}
    control = SimpleNamespace(fleet=lambda: fleet, heartbeats=lambda: found)
    assert worker._is_fleet_away(control) is away  # type: ignore[arg-type]
