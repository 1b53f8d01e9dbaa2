"""What every replay buffer does, on every backend: `ddil_dist/replay/buffer.py` is the page that this holds them to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ddil_dist.config import ReplayConfig
from ddil_dist.errors import CheckpointError, ConfigError, RecordError, ReplayError, WaitTimeoutError
from ddil_dist.replay import ReplayBuffer
from ddil_dist.replay.codec import Codec
from ddil_dist.states import States
from ddil_dist.types import NO_POLICY, Draw, StateSource
from tests.support.states import Wider, weights_at

from .conftest import MakeReplay
from .support import make_config, make_state, make_states

FORWARD, STUDENT, TEACHER = StateSource.FORWARD, StateSource.STUDENT, StateSource.TEACHER


def fill(replay: ReplayBuffer, num: int, *, batch: int = 30) -> None:
    for batch_id, begin in enumerate(range(0, num, batch)):
        assert replay.insert(make_states(begin, min(num, begin + batch)), writer="w", batch_id=batch_id, timeout_s=5)


def draw(replay: ReplayBuffer, num: int, **filters: object) -> States[Any]:
    return replay.sample([Draw(num, **filters)], timeout_s=5)  # type: ignore[arg-type]


class TestRoundTrip:
    def test_a_state_comes_back_as_it_went_in(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        rng = np.random.default_rng(0)
        latent = rng.standard_normal((1, 4, 5, 6)).astype(np.float32)
        answer = rng.standard_normal((1, 4, 5, 6)).astype(np.float32)
        state = make_state(
            7,
            x_t=latent,
            label=answer,
            timestep=749,
            prompt="ein Haus über dem Fluss 雨",
            guidance_scale=4.5,
            source=TEACHER,
            policy_version=NO_POLICY,
            trajectory_id=2**62,
            step_index=3,
        )
        assert replay.insert(state, writer="w", batch_id=0, timeout_s=5)
        found = draw(replay, 2)
        np.testing.assert_array_equal(found.x_t, [latent[0], latent[0]])
        assert found.label is not None
        np.testing.assert_array_equal(found.label, [answer[0], answer[0]])
        assert found.x_t.dtype == np.float32
        assert found.prompt == ["ein Haus über dem Fluss 雨"] * 2
        assert found.timestep.tolist() == [749, 749]
        assert found.guidance_scale.tolist() == [4.5, 4.5]
        assert found.source.tolist() == [TEACHER, TEACHER]
        assert found.policy_version.tolist() == [NO_POLICY, NO_POLICY]
        assert found.trajectory_id.tolist() == [2**62, 2**62]
        assert found.step_index.tolist() == [3, 3]
        assert found.staleness.tolist() == [0, 0]

    def test_bfloat16_travels_as_bit_patterns(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        bits = np.arange(24, dtype=np.uint16).reshape(1, 2, 3, 4) + 0x3F80
        replay.insert(make_state(0, x_t=bits), writer="w", batch_id=0, timeout_s=5)
        found = draw(replay, 1)
        assert found.x_t.dtype == np.uint16
        np.testing.assert_array_equal(found.x_t, bits)

    def test_a_buffer_keeps_the_dtype_that_it_began_with(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        replay.insert(make_states(0, 3), writer="w", batch_id=0, timeout_s=5)

        def open_with_another() -> None:
            other = make_replay(make_config(latent_dtype="bfloat16"))
            other.load_state_dict(replay.state_dict())  # type: ignore[attr-defined]

        with pytest.raises((ConfigError, CheckpointError), match=r"replay\.latent_dtype"):
            open_with_another()

    def test_labels_are_given_only_where_every_state_has_one(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        for batch_id, state in enumerate((make_state(0, labelled=True, source=TEACHER), make_state(1))):
            replay.insert(state, writer="w", batch_id=batch_id, timeout_s=5)
        labels = draw(replay, 8, sources=frozenset({TEACHER})).label
        assert labels is not None
        np.testing.assert_array_equal(labels, np.full((8, 2, 3, 4), 0.5))
        both = replay.sample([Draw(1, frozenset({TEACHER})), Draw(1, frozenset({STUDENT}))], timeout_s=5)
        assert both.label is None


class TestAFieldMore:
    """Declared once, it is inserted, counted, chosen by and sampled; and records from before it have its default."""

    def test_it_goes_in_and_comes_out(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(), kind=Wider)
        plain = make_states(0, 12)
        columns = {name: getattr(plain, name) for name in Codec().values}
        columns |= {"reward": np.arange(12) / 2, "judge": [f"judge {n}" for n in range(12)], "seen": [5] * 12}
        replay.insert(Wider.of(columns, x_t=plain.x_t, hint=plain.x_t + 1), writer="w", batch_id=0, timeout_s=5)
        found = draw(replay, 40)
        assert isinstance(found, Wider)
        assert found.reward.tolist() == (found.trajectory_id / 2).tolist()
        assert found.judge == [f"judge {n}" for n in found.trajectory_id]
        assert set(found.seen.tolist()) == {5}
        assert found.hint is not None
        np.testing.assert_array_equal(found.hint, found.x_t + 1)
        assert replay.stats().by_source == {STUDENT: 12}

    def test_what_it_is_part_of_is_kept_apart(self, make_replay: MakeReplay) -> None:
        """`seen` is part of the metadata, by which slots are grouped: each is found where it was put, or put anew."""
        replay = make_replay(make_config(capacity=90), kind=Wider)
        seen = (0, 1, 2, 1, 0)
        for batch_id, value in enumerate(seen):
            plain = make_states(30 * batch_id, 30 * batch_id + 30)
            columns = {name: getattr(plain, name) for name in Codec().values}
            states = Wider.of(columns | {"seen": [value] * 30}, x_t=plain.x_t)
            replay.insert(states, writer="w", batch_id=batch_id, timeout_s=5)
        found = draw(replay, 300)
        assert isinstance(found, Wider)
        assert found.seen.tolist() == [seen[n // 30] for n in found.trajectory_id]
        assert set(found.seen.tolist()) == {0, 1, 2}
        assert set(found.reward.tolist()) == {-1.5}


class TestExactlyOnce:
    def test_a_repeated_batch_is_not_stored_again(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        assert replay.insert(make_states(0, 5), writer="w", batch_id=4, timeout_s=5)
        assert not replay.insert(make_states(0, 5), writer="w", batch_id=4, timeout_s=5)
        assert (replay.stats().size, replay.stats().num_inserted) == (5, 5)

    def test_writers_number_their_batches_apart(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        assert replay.insert(make_states(0, 5), writer="actor-0.1", batch_id=0, timeout_s=5)
        assert replay.insert(make_states(5, 10), writer="actor-0.2", batch_id=0, timeout_s=5)
        assert replay.stats().size == 10

    def test_a_late_batch_is_stored_once(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        order = [0, 3, 1, 3, 2, 1, 0, 31, 30, 2]
        stored = [replay.insert(make_state(b), writer="w", batch_id=b, timeout_s=5) for b in order]
        assert stored == [True, True, True, False, True, False, False, True, True, False]
        assert replay.stats().size == 6

    def test_numbers_may_begin_anywhere(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        assert replay.insert(make_states(0, 5), writer="w", batch_id=4, timeout_s=5)
        assert set(draw(replay, 100).trajectory_id.tolist()) == set(range(5))
        assert replay.stats().num_refused == 0

    def test_a_batch_too_late_to_tell_is_refused(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        replay.insert(make_state(0), writer="w", batch_id=99, timeout_s=5)
        with pytest.raises(ReplayError, match=r"batch 0 of writer 'w' is 32 or more behind its newest, 99"):
            replay.insert(make_state(1), writer="w", batch_id=0, timeout_s=5)
        assert replay.stats().size == 1


class TestRemoval:
    def test_the_oldest_go_first(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(capacity=90))
        fill(replay, 300)
        assert set(draw(replay, 600).trajectory_id.tolist()) == set(range(210, 300))
        stats = replay.stats()
        assert (stats.size, stats.num_inserted, stats.capacity) == (90, 300, 90)

    def test_bytes_bound_the_buffer_too(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(capacity_bytes=30_000))
        fill(replay, 300)
        stats = replay.stats()
        assert 20_000 < stats.size_bytes <= 30_000
        assert sum(stats.by_source.values()) == stats.size
        newest = set(range(300 - stats.size, 300))
        assert set(draw(replay, 3000).trajectory_id.tolist()) <= set(range(300 - stats.size - 90, 300))
        assert newest & set(draw(replay, 3000).trajectory_id.tolist())

    def test_a_state_larger_than_the_bound_is_refused(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(capacity_bytes=600))
        with pytest.raises(RecordError, match=r"a record of \d+ bytes exceeds .*replay.capacity_bytes"):
            replay.insert(make_state(0, shape=(4, 8, 8)), writer="w", batch_id=0, timeout_s=5)
        assert replay.stats().num_refused == 1

    def test_a_reservoir_keeps_every_state_with_equal_chance(self, make_replay: MakeReplay) -> None:
        kept: Counter[int] = Counter()
        trials, capacity = 40, 30
        for trial in range(trials):
            replay = make_replay(make_config(capacity=capacity, removal="reservoir"), seed=trial, part=trial)
            for batch in range(6):
                states = make_states(batch * 20, batch * 20 + 20)
                replay.insert(states, writer="w", batch_id=batch, timeout_s=5)
            stats = replay.stats()
            assert (stats.size, stats.num_inserted) == (capacity, 120)
            kept.update(set(draw(replay, 600).trajectory_id.tolist()))
        sixths = [sum(kept[n] for n in range(begin, begin + 20)) for begin in range(0, 120, 20)]
        assert sum(sixths) == trials * capacity
        assert max(abs(found - trials * capacity / 6) for found in sixths) < 60  # 5 standard deviations

    def test_a_reservoir_keeps_to_its_bytes(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(capacity_bytes=30_000, removal="reservoir"))
        rng = np.random.default_rng(0)
        for batch in range(20):
            numbers = range(batch * 20, batch * 20 + 20)
            states = States.join([make_state(n, prompt="x" * int(rng.integers(2000))) for n in numbers])
            replay.insert(states, writer="w", batch_id=batch, timeout_s=5)
            stats = replay.stats()
            assert stats.size_bytes <= 30_000
            assert sum(stats.by_timestep.values()) == stats.size
        kept = set(draw(replay, 2000).trajectory_id.tolist())
        assert len(kept) == replay.stats().size
        assert min(kept) < 200


class TestSampling:
    def test_it_is_uniform_over_what_is_live(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(capacity=90))
        fill(replay, 120)
        counts = Counter(draw(replay, 9000).trajectory_id.tolist())
        assert set(counts) == set(range(30, 120))
        assert max(abs(count - 100) for count in counts.values()) < 50  # 5 standard deviations

    def test_draws_choose_by_source_timestep_and_age_in_their_order(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        states = States.join(
            [
                make_state(n, source=(STUDENT, TEACHER)[n % 2], timestep=(999, 749, 499)[n % 3], policy_version=n)
                for n in range(60)
            ]
        )
        replay.insert(states, writer="w", batch_id=0, timeout_s=5)
        replay.note_weights(weights_at(59))
        found = replay.sample(
            [
                Draw(20, sources=frozenset({TEACHER})),
                Draw(30, timesteps=frozenset({749, 499})),
                Draw(10, max_age=9),
                Draw(10, min_age=10, max_age=19),
                Draw(5, sources=frozenset({STUDENT}), timesteps=frozenset({999}), max_age=29),
            ],
            timeout_s=5,
        )
        assert set(found.source[:20].tolist()) == {int(TEACHER)}
        assert set(found.timestep[20:50].tolist()) == {749, 499}
        assert set(found.staleness[50:60].tolist()) <= set(range(10))
        assert set(found.staleness[60:70].tolist()) <= set(range(10, 20))
        assert set(found.trajectory_id[70:].tolist()) <= {30, 36, 42, 48, 54}
        np.testing.assert_array_equal(found.staleness, 59 - found.policy_version)
        np.testing.assert_array_equal(found.x_t[:, 0, 0, 0], found.trajectory_id)
        assert found.prompt == [f"state {n}" for n in found.trajectory_id]

    def test_states_without_a_policy_have_no_age(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(max_staleness=5))
        replay.insert(
            States.join([make_state(0, policy_version=NO_POLICY, source=FORWARD), make_state(1, policy_version=3)]),
            writer="w",
            batch_id=0,
            timeout_s=5,
        )
        replay.note_weights(weights_at(100))
        found = draw(replay, 20)
        assert set(found.trajectory_id.tolist()) == {0}
        assert set(found.staleness.tolist()) == {0}

    def test_a_missing_stratum_is_waited_for(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        fill(replay, 30)
        with pytest.raises(
            WaitTimeoutError,
            match=r"waited \d.\d s for inserts: none of the 30 live states is of source teacher and timestep 499",
        ):
            replay.sample([Draw(4, frozenset({TEACHER}), frozenset({499}))], timeout_s=0.2)
        teacher = make_states(30, 35, source=TEACHER, timestep=499)
        later = threading.Timer(0.2, lambda: replay.insert(teacher, writer="other", batch_id=0, timeout_s=5))
        later.start()
        found = replay.sample([Draw(4, frozenset({TEACHER}), frozenset({499}))], timeout_s=5)
        later.join()
        assert set(found.trajectory_id.tolist()) <= set(range(30, 35))

    def test_nothing_may_be_asked_for(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        with pytest.raises(ConfigError, match="a sample of no states"):
            replay.sample([], timeout_s=1)
        with pytest.raises(ConfigError, match="asks for nothing"):
            replay.sample([Draw(3, sources=frozenset())], timeout_s=1)
        with pytest.raises(ConfigError, match="an insert of no states"):
            replay.insert(make_state(0).rows([]), writer="w", batch_id=0, timeout_s=1)


class TestRateLimiter:
    CONFIG = ReplayConfig(capacity=1000, min_size=60, samples_per_insert=2.0, error_buffer=120.0)

    def test_samples_wait_for_the_least_size(self, make_replay: MakeReplay) -> None:
        replay = make_replay(self.CONFIG)
        fill(replay, 30)
        assert not replay.can_sample(1)
        with pytest.raises(
            WaitTimeoutError,
            match=r"a sample of 8 states waited 0.\d s for inserts: 30 states are live, replay.min_size is 60",
        ):
            replay.sample([Draw(8)], timeout_s=0.2)
        replay.insert(make_states(30, 60), writer="w", batch_id=1, timeout_s=5)
        assert replay.can_sample(8)
        assert len(draw(replay, 8)) == 8

    def test_samples_wait_when_they_run_ahead(self, make_replay: MakeReplay) -> None:
        replay = make_replay(self.CONFIG)
        fill(replay, 60)
        draw(replay, 60)
        draw(replay, 60)  # cursor 60 * 2 - 120 = 0 = centre 120 - buffer 120
        assert not replay.can_sample(1)
        with pytest.raises(WaitTimeoutError, match="for about 30 more inserts"):
            replay.sample([Draw(60)], timeout_s=0.2)
        assert replay.stats().num_sampled == 120
        replay.insert(make_states(60, 90), writer="w", batch_id=9, timeout_s=5)
        assert len(draw(replay, 60)) == 60

    def test_inserts_wait_when_they_run_ahead(self, make_replay: MakeReplay) -> None:
        replay = make_replay(self.CONFIG)
        fill(replay, 120)  # cursor 240 = centre 120 + buffer 120
        assert not replay.can_insert(1)
        with pytest.raises(WaitTimeoutError, match="for about 60 more samples: inserts run ahead"):
            replay.insert(make_states(120, 150), writer="w", batch_id=9, timeout_s=0.2)
        draw(replay, 60)
        assert replay.insert(make_states(120, 150), writer="w", batch_id=9, timeout_s=5)
        assert replay.stats().cursor == 150 * 2 - 60

    def test_a_waiting_insert_goes_on_when_samples_are_taken(self, make_replay: MakeReplay) -> None:
        replay = make_replay(self.CONFIG)
        fill(replay, 120)
        later = threading.Timer(0.2, lambda: draw(replay, 60))
        later.start()
        begin = time.monotonic()
        assert replay.insert(make_states(120, 150), writer="w", batch_id=9, timeout_s=5)
        assert 0.1 < time.monotonic() - begin < 4
        later.join()
        assert replay.stats().waits_s["insert for samples"] > 0.1

    def test_settings_change_while_it_runs(self, make_replay: MakeReplay) -> None:
        replay = make_replay(self.CONFIG)
        fill(replay, 120)
        assert not replay.can_insert(60)
        replay.configure(samples_per_insert=1.0)
        assert replay.can_insert(60)
        assert replay.stats().settings["samples_per_insert"] == 1.0
        replay.configure(max_staleness=3)
        replay.note_weights(weights_at(10))
        with pytest.raises(WaitTimeoutError, match=r"within replay.max_staleness = 3 of version 10"):
            replay.sample([Draw(1)], timeout_s=0.1)
        replay.configure(max_staleness=None)
        assert draw(replay, 1).staleness.tolist() == [10]
        with pytest.raises(ConfigError, match=r"replay.samples_per_insert: -1; it must be a positive number"):
            replay.configure(samples_per_insert=-1)
        with pytest.raises(ConfigError, match="capacity: cannot be changed on a running run"):
            replay.configure(capacity=5)

    def test_what_could_never_go_on_is_refused_at_once(self, make_replay: MakeReplay) -> None:
        replay = make_replay(self.CONFIG)
        with pytest.raises(ConfigError, match=r"one insert of 121 states moves the limiter \(242 samples\)"):
            replay.insert(make_states(0, 121), writer="w", batch_id=0, timeout_s=60)
        with pytest.raises(ConfigError, match="less than half of a sample of 241 states"):
            replay.sample([Draw(241)], timeout_s=60)


class TestWhatBecameOfStates:
    @pytest.mark.parametrize("removal", ["oldest", "reservoir"])
    def test_a_state_counts_as_used_once_by_timestep_and_actor(self, make_replay: MakeReplay, removal: str) -> None:
        """Also when its slot has been given to another, and whatever the life of its actor."""
        replay = make_replay(make_config(capacity=30, removal=removal))
        timesteps, actors = (999, 749, 499), ("actor-0", "actor-1")
        used: set[int] = set()
        for batch in range(12):
            begin = batch * 10
            states = States.join([make_state(n, timestep=timesteps[n % 3]) for n in range(begin, begin + 10)])
            writer = f"{actors[batch % 2]}.{1 + batch // 4}"
            for _ in range(2):  # a repeated insert counts once
                replay.insert(states, writer=writer, batch_id=batch, timeout_s=5)
            used |= set(draw(replay, 4).trajectory_id.tolist())
            used |= set(draw(replay, 3, timesteps=frozenset({999})).trajectory_id.tolist())
        stats = replay.stats()
        live = set(draw(replay, 1000).trajectory_id.tolist())
        assert len(live) == stats.size == 30
        assert stats.num_unused == len(live - used)
        assert dict(stats.inserted_by_timestep) == {499: 40, 749: 40, 999: 40}
        assert dict(stats.inserted_by_actor) == {"actor-0": 60, "actor-1": 60}
        assert dict(stats.used_by_timestep) == dict(sorted(Counter(timesteps[n % 3] for n in used).items()))
        assert dict(stats.used_by_actor) == dict(sorted(Counter(actors[n // 10 % 2] for n in used).items()))
        assert replay.stats().num_unused == 0, "every live state has been drawn by now"

    def test_a_staleness_bound_starves_who_is_slow(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(max_staleness=5))
        replay.note_weights(weights_at(10))
        replay.insert(make_states(0, 10, policy_version=2), writer="slow.1", batch_id=0, timeout_s=5)
        replay.insert(make_states(10, 20, policy_version=9), writer="fast.1", batch_id=0, timeout_s=5)
        draw(replay, 300)
        stats = replay.stats()
        assert dict(stats.inserted_by_actor) == {"fast": 10, "slow": 10}
        assert dict(stats.used_by_actor) == {"fast": 10}
        assert stats.num_unused == 10

    def test_a_sample_that_was_not_to_be_had_uses_nothing(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(min_size=30))
        fill(replay, 29)
        with pytest.raises(WaitTimeoutError):
            replay.sample([Draw(8)], timeout_s=0.1)
        assert (replay.stats().num_unused, dict(replay.stats().used_by_timestep)) == (29, {})


class TestStatistics:
    def test_counts_are_of_what_is_live(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config(capacity=90))
        for batch in range(6):
            replay.insert(
                make_states(
                    batch * 30,
                    batch * 30 + 30,
                    source=(STUDENT, TEACHER)[batch % 2],
                    policy_version=(batch * 10, NO_POLICY)[batch % 2],
                    timestep=100 + batch,
                ),
                writer="w",
                batch_id=batch,
                timeout_s=5,
            )
        replay.note_weights(weights_at(40))
        replay.note_weights(weights_at(30))  # never goes back
        replay.sample([Draw(7, frozenset({TEACHER})), Draw(5, frozenset({STUDENT}))], timeout_s=5)
        stats = replay.stats()
        assert dict(stats.by_source) == {TEACHER: 60, STUDENT: 30}
        assert dict(stats.by_version) == {NO_POLICY: 60, 40: 30}
        assert dict(stats.by_timestep) == {103: 30, 104: 30, 105: 30}
        assert dict(stats.sampled_by_source) == {STUDENT: 5, TEACHER: 7}
        assert (stats.size, stats.num_inserted, stats.num_sampled, stats.newest_version) == (90, 180, 12, 40)
        assert stats.weights == weights_at(40)
        assert stats.cursor == 180 - 12

    def test_a_state_that_breaks_a_rule_is_counted(self, make_replay: MakeReplay) -> None:
        replay = make_replay(make_config())
        with pytest.raises(RecordError, match=r"source: 4; it must be 0 to 3"):
            replay.insert(make_state(0, source=4), writer="w", batch_id=0, timeout_s=5)
        replay.insert(make_states(0, 3), writer="w", batch_id=0, timeout_s=5)
        with pytest.raises(RecordError, match=r"states are float32:1x1x1, this run's are float32:2x3x4"):
            replay.insert(make_state(0, shape=(1, 1, 1)), writer="w", batch_id=3, timeout_s=5)
        stats = replay.stats()
        assert (stats.num_refused, stats.size, stats.num_inserted) == (2, 3, 3)
