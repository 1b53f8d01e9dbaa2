"""The shell of a rollout process, without Ray and Redis."""

from __future__ import annotations

from typing import Any

import pytest

from actors import worker as worker_module
from actors.fleet import FleetManager
from actors.worker import FleetSpec, RolloutWorker
from ddil_dist.config import RunConfig, load_config
from ddil_dist.errors import WaitTimeoutError


class Clock:
    """Time that goes on by what is done in it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class FakeRollout:
    """Ticks of a second; the weight board is silent, for as long as a call may take, until it is not."""

    def __init__(self, clock: Clock, *, silent_until: float, stop: Any) -> None:
        self._clock, self._silent_until, self._stop = clock, silent_until, stop
        self.ticks = 0
        self.applied: list[float] = []

    def refresh(self) -> object | None:
        if self._clock.now < self._silent_until:
            self._clock.now += 60
            raise WaitTimeoutError("asking for the newest version waited 60 s for the run's weight board")
        self.applied.append(self._clock.now)
        return object()

    def work(self, *, should_stop: object) -> None:
        self.ticks += 1
        self._clock.now += 1
        if self.ticks == 200:
            self._stop()

    def heartbeat(self) -> dict[str, Any]:
        return {}


class Control:
    """Hears heartbeats."""

    def heartbeat(self, actor: str, beat: object) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(worker_module, "time", clock)
    return clock


def test_a_silent_board_does_not_end_rollouts(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    worker = RolloutWorker(FleetSpec(config=RunConfig(), board=None), index=0, incarnation=1)
    rollout = FakeRollout(clock, silent_until=250.0, stop=worker.stop)
    worker._loop(rollout, Control())  # type: ignore[arg-type]
    assert rollout.ticks == 200
    assert rollout.applied[0] >= 250, "and takes newer weights once it answers"
    assert capsys.readouterr().out.count("waited 60 s for the run's weight board") == 2, (
        "it rolls out as long as it waits"
    )


def test_the_first_weights_are_waited_for_though_the_board_is_silent(clock: Clock) -> None:
    worker = RolloutWorker(FleetSpec(config=RunConfig(), board=None), index=0, incarnation=1)
    worker._stop.wait = lambda seconds: False  # type: ignore[method-assign,assignment]
    rollout = FakeRollout(clock, silent_until=250.0, stop=worker.stop)
    worker._await_first_weights(rollout)  # type: ignore[arg-type]
    assert rollout.applied
    late = FakeRollout(clock, silent_until=1e9, stop=worker.stop)
    with pytest.raises(WaitTimeoutError, match=r"actor-0\.1 waited 300 s for the learner's first weights"):
        worker._await_first_weights(late)  # type: ignore[arg-type]


def test_writers_of_two_lives_of_a_fleet_are_told_apart_where_a_server_of_several_may_forget() -> None:
    spec = FleetSpec(config=RunConfig(), board=None)
    assert RolloutWorker(spec, index=3, incarnation=2)._writer == "actor-3.2"
    assert RolloutWorker(spec, index=3, incarnation=2, fleet="a1b2")._writer == "actor-3-a1b2.2"
    several = load_config(None, ["redis.url=redis://127.0.0.1:1", "redis.more_urls=[redis://127.0.0.1:2]"])
    fleets = [FleetManager(FleetSpec(config=config, board=None)) for config in (RunConfig(), several, several)]
    names = [fleet._name for fleet in fleets]
    assert names[0] == ""
    assert len({*names}) == 3
    for fleet in fleets:
        fleet._draining.set()
