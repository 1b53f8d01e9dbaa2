"""Counters always equal what is live: random histories against a model that keeps everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddil_dist.replay import InMemoryReplay, RedisReplay, ReplayBuffer
from ddil_dist.replay.codec import Codec
from ddil_dist.replay.index import EMPTY, SlotIndex
from ddil_dist.states import States
from ddil_dist.types import NO_POLICY, Draw, StateSource

from .support import make_config, make_state, make_states, record_of

CAPACITY = 13
SOURCES = [StateSource.FORWARD, StateSource.STUDENT, StateSource.TEACHER]

_parts = count()

# A history: batches of (writer, batch id, states as (source, timestep, version)), some of them sent more than once.
state_kinds = st.tuples(st.sampled_from(SOURCES), st.sampled_from([999, 749, 0]), st.none() | st.integers(0, 3))
batches = st.tuples(st.sampled_from("ab"), st.integers(0, 6), st.lists(state_kinds, min_size=1, max_size=20))
histories = st.lists(batches, min_size=1, max_size=12)


def replay_history(replay: ReplayBuffer, history: list[tuple[str, int, list[tuple[StateSource, int, int | None]]]]):  # type: ignore[no-untyped-def]
    """Insert it all; returns the states that were stored, in order."""
    stored: list[States[Any]] = []
    seen: set[tuple[str, int]] = set()
    number = count()
    for writer, batch_id, kinds in history:
        states = [
            make_state(
                next(number),
                source=source,
                timestep=timestep,
                policy_version=NO_POLICY if version is None else version,
                prompt="p" * (version or 0),
            )
            for source, timestep, version in kinds
        ]
        fresh = replay.insert(States.join(states), writer=writer, batch_id=batch_id, timeout_s=5)
        assert fresh == ((writer, batch_id) not in seen)
        if fresh:
            stored += states
            seen.add((writer, batch_id))
    return stored


def check_counts(replay: ReplayBuffer, live: list[States[Any]]) -> None:
    stats = replay.stats()
    assert stats.size == len(live)
    assert stats.size_bytes == sum(len(record_of(s)) for s in live)
    for found, name in (
        (stats.by_source, "source"),
        (stats.by_timestep, "timestep"),
        (stats.by_version, "policy_version"),
    ):
        assert dict(found) == dict(Counter(int(getattr(s, name)[0]) for s in live))


def live_states(replay: ReplayBuffer, stored: list[States[Any]]) -> list[States[Any]]:
    """What sampling can reach: with so few states, 40 draws each miss none."""
    if not replay.stats().size:
        return []
    found = set(replay.sample([Draw(40 * CAPACITY)], timeout_s=5).trajectory_id.tolist())
    return [state for state in stored if int(state.trajectory_id[0]) in found]


class TestCounters:
    @given(histories)
    @settings(max_examples=100, deadline=None)
    def test_in_memory_oldest_first(self, history: list) -> None:  # type: ignore[type-arg]
        replay = InMemoryReplay(make_config(capacity=CAPACITY), seed=0)
        stored = replay_history(replay, history)
        check_counts(replay, stored[-CAPACITY:])
        assert replay.stats().num_inserted == len(stored)

    @given(history=histories)
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_in_redis_oldest_first(self, make_redis: Callable[..., RedisReplay], history: list) -> None:  # type: ignore[type-arg]
        replay = make_redis(make_config(capacity=CAPACITY), part=next(_parts))
        stored = replay_history(replay, history)
        check_counts(replay, stored[-CAPACITY:])
        assert replay.stats().num_inserted == len(stored)
        ids, kept = (
            [int(s.trajectory_id[0]) for s in some] for some in (live_states(replay, stored), stored[-CAPACITY:])
        )
        assert ids == kept

    @given(history=histories, bound=st.integers(300, 3000), removal=st.sampled_from(["oldest", "reservoir"]))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @pytest.mark.parametrize("backend", ["memory", "redis"])
    def test_under_a_bound_in_bytes(
        self,
        make_redis: Callable[..., RedisReplay],
        history: list,  # type: ignore[type-arg]
        bound: int,
        removal: str,
        backend: str,
    ) -> None:
        config = make_config(capacity=CAPACITY, capacity_bytes=bound, removal=removal)
        replay: ReplayBuffer
        replay = InMemoryReplay(config, seed=0) if backend == "memory" else make_redis(config, part=next(_parts))
        stored = replay_history(replay, history)
        check_counts(replay, live_states(replay, stored))
        assert replay.stats().size_bytes <= bound

    @given(histories)
    @settings(max_examples=60, deadline=None)
    def test_a_saved_buffer_goes_on_exactly(self, history: list) -> None:  # type: ignore[type-arg]
        one = InMemoryReplay(make_config(capacity=CAPACITY), seed=3)
        stored = replay_history(one, history)
        one.sample([Draw(5)], timeout_s=5)
        two = InMemoryReplay(make_config(capacity=CAPACITY), seed=99)
        two.load_state_dict(one.state_dict())
        check_counts(two, stored[-CAPACITY:])
        for replay in (one, two):
            replay.insert(make_states(1000, 1003), writer="later", batch_id=0, timeout_s=5)
        for _ in range(3):
            draws = [Draw(7), Draw(4, timesteps=frozenset({999}))]
            ours, theirs = (replay.sample(draws, timeout_s=5) for replay in (one, two))
            np.testing.assert_array_equal(ours.trajectory_id, theirs.trajectory_id)
            np.testing.assert_array_equal(ours.x_t, theirs.x_t)
        assert one.stats() == two.stats()


class TestSlotIndex:
    @given(st.lists(st.tuples(st.integers(0, 9), st.none() | state_kinds), max_size=60))
    @settings(max_examples=200, deadline=None)
    def test_it_holds_what_was_set_last(
        self, changes: list[tuple[int, tuple[StateSource, int, int | None] | None]]
    ) -> None:
        index, model = SlotIndex(), {}
        for slot, kind in changes:
            if kind is None:
                index.set(slot, None)
                model.pop(slot, None)
            else:
                source, timestep, version = kind
                index.set(slot, (source, timestep, NO_POLICY if version is None else version))
                model[slot] = kind
        loaded = SlotIndex()
        meta = np.zeros(10, Codec().meta_dtype)
        meta["source"] = EMPTY
        for slot, (source, timestep, version) in model.items():
            meta[slot] = (source, timestep, NO_POLICY if version is None else version, 100)
        loaded.load(meta)
        rng = np.random.default_rng(0)
        for either in (index, loaded):
            assert len(either) == len(model)
            for draw in (
                Draw(1),
                Draw(1, frozenset({SOURCES[1]})),
                Draw(1, timesteps=frozenset({999})),
                Draw(1, max_age=1),
            ):
                wanted = {
                    slot
                    for slot, (source, timestep, version) in model.items()
                    if (draw.sources is None or source in draw.sources)
                    and (draw.timesteps is None or timestep in draw.timesteps)
                    and (draw.max_age is None or version is None or 3 - version <= draw.max_age)
                }
                assert either.count(draw, newest=3, staleness=None) == len(wanted)
                if wanted:
                    slots, by_source = either.choose(draw, 300, newest=3, staleness=None, rng=rng)
                    assert set(slots) == wanted
                    assert by_source.sum() == 300
