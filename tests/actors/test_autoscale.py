"""Autoscaling against a model of its world: a learner that can use the work of D actors."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from actors.autoscale import Autoscaler, Load
from actors.load import measure_load
from ddil_dist.config import AutoscaleConfig
from ddil_dist.types import ReplayStats

CONFIG = AutoscaleConfig(min=1, max=64)


def world(actors: int, demand: float) -> Load:
    """What `actors` actors and a learner that can use `demand` of them show: one side waits for the other."""
    return Load(busy=min(actors, demand), learner_wait=max(0.0, 1 - actors / demand))


@pytest.mark.parametrize("demand", [0.3, 1.0, 2.5, 3.0, 7.9, 20.0, 63.5])
@pytest.mark.parametrize("start", [1, 4, 64])
def test_a_steady_demand_is_met_and_then_left_alone(demand: float, start: int) -> None:
    scaler, actors = Autoscaler(CONFIG), start
    seen = []
    for _ in range(40):
        actors = scaler.next(actors, world(actors, demand))
        seen.append(actors)
    assert len(set(seen[20:])) == 1
    assert world(actors, demand).learner_wait <= CONFIG.learner_wait
    assert actors <= max(math.ceil(demand * 1.2), start if start <= math.ceil(demand * 1.2) else 0)


def test_noise_of_a_tenth_does_not_make_it_flap() -> None:
    draws = random.Random(0)
    scaler, actors = Autoscaler(CONFIG), 1
    seen = []
    for _ in range(500):
        actors = scaler.next(actors, world(actors, 6.0 * draws.uniform(0.9, 1.1)))
        seen.append(actors)
    changes = sum(a != b for a, b in itertools.pairwise(seen[50:]))
    assert changes <= 2
    assert set(seen[50:]) <= {7, 8}


def test_it_follows_a_demand_that_moves_and_stays_within_its_bounds() -> None:
    scaler = Autoscaler(AutoscaleConfig(min=2, max=10))
    actors = 2
    for demand, reached in ((30.0, 10), (0.5, 2), (5.0, 5)):
        for _ in range(12):
            actors = scaler.next(actors, world(actors, demand))
            assert 2 <= actors <= 10
        assert actors == reached


def test_it_at_most_doubles_and_shrinks_only_after_three_windows() -> None:
    scaler = Autoscaler(CONFIG)
    assert scaler.next(4, Load(busy=4.0, learner_wait=0.9)) == 8
    scaler = Autoscaler(CONFIG)
    idle = Load(busy=1.0, learner_wait=0.0)
    assert [scaler.next(10, idle) for _ in range(3)] == [10, 10, 2]


def test_a_learner_that_waits_for_what_more_actors_would_not_bring_adds_none() -> None:
    """It waits a little, and so do the actors: for states of a kind that none makes now."""
    assert Autoscaler(CONFIG).next(10, Load(busy=6.0, learner_wait=0.1)) == 10


STATS = ReplayStats(
    size=1,
    size_bytes=1,
    capacity=1,
    num_inserted=1,
    num_sampled=1,
    num_refused=0,
    by_source={},
    by_version={},
    by_timestep={},
    waits_s={"sample for inserts": 10.0, "insert for samples": 3.0},
    incarnation="a",
    num_samplers=2,
)


def beat(alive_s: float, waited_s: float, writer: str = "actor-0.1") -> dict[str, Any]:
    return {"writer": writer, "alive_s": alive_s, "insert_wait_s": waited_s}


def test_load_is_read_from_what_actors_and_samplers_waited() -> None:
    later = replace(STATS, waits_s={"sample for inserts": 14.0, "sample for states": 2.0, "insert for samples": 99.0})
    before = {"actor-0": beat(100, 50), "actor-1": beat(10, 0, "actor-1.1"), "actor-2": beat(5, 5, "actor-2.1")}
    after = {
        "actor-0": beat(110, 55),  # half of its time
        "actor-1": beat(20, 0, "actor-1.1"),  # none of it
        "actor-2": beat(1, 0, "actor-2.2"),  # died and came back within the window: it says nothing
        "actor-3": {"writer": "actor-3.1", "loading": True},
    }
    load = measure_load(before, STATS, after, later, seconds=10.0)
    assert load == Load(busy=pytest.approx(1.5), learner_wait=pytest.approx((4.0 + 2.0) / 10 / 2))
    assert measure_load(before, STATS, after, replace(later, incarnation="b"), seconds=10.0) is None
    assert measure_load({}, STATS, {}, later, seconds=10.0) is None
