"""The rate limiter against Reverb's definition, and Redis's copy of the arithmetic against it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddil_dist.errors import ConfigError, WaitTimeoutError
from ddil_dist.replay import InMemoryReplay, LimiterSettings, RateLimiter, RedisReplay, ReplayBuffer
from ddil_dist.types import Draw

from .support import make_config, make_states

numbers = st.integers(0, 500)


class ReverbLimiter:
    """`RateLimiter` of reverb/cc/rate_limiter.cc under SampleToInsertRatio, one item at a time, without deletes."""

    def __init__(self, samples_per_insert: float, min_size: int, error_buffer: float) -> None:
        self.ratio, self.min_size = samples_per_insert, min_size
        self.min_diff = samples_per_insert * min_size - error_buffer
        self.max_diff = samples_per_insert * min_size + error_buffer

    def can_sample(self, inserts: int, samples: int, num: int) -> bool:
        return inserts >= self.min_size and inserts * self.ratio - samples - num >= self.min_diff

    def can_insert(self, inserts: int, samples: int) -> bool:
        return inserts + 1 <= self.min_size or (inserts + 1) * self.ratio - samples <= self.max_diff


class TestAgainstReverb:
    @given(numbers, numbers, st.integers(1, 50), st.integers(1, 8), st.integers(1, 100), st.integers(1, 300))
    def test_it_decides_as_reverb_does(
        self, inserts: int, samples: int, num: int, ratio: int, min_size: int, error_buffer: int
    ) -> None:
        settings = LimiterSettings(ratio / 2, min_size, error_buffer)
        ours = RateLimiter(settings, num_inserted=inserts, num_sampled=samples, size=inserts)
        theirs = ReverbLimiter(ratio / 2, min_size, error_buffer)
        assert ours.can_sample(num) == theirs.can_sample(inserts, samples, num)
        assert ours.can_insert(1) == theirs.can_insert(inserts, samples)

    @given(st.integers(1, 8), st.integers(1, 50), st.integers(1, 40), st.integers(1, 40))
    def test_one_side_can_always_go_on(self, ratio: int, min_size: int, batch: int, insert: int) -> None:
        """With 2 error_buffer >= batch + insert * ratio, samples and inserts never wait for each other."""
        settings = LimiterSettings(float(ratio), min_size, (batch + insert * ratio) / 2 + ratio)
        inserts = samples = 0
        for turn in range(200):
            limiter = RateLimiter(settings, num_inserted=inserts, num_sampled=samples, size=inserts)
            may_insert, may_sample = limiter.can_insert(insert), limiter.can_sample(batch)
            assert may_insert or may_sample
            if may_sample and (turn % 3 or not may_insert):
                samples += batch
            else:
                inserts += insert


class TestBackendsAgree:
    """The same requests to both backends, one after the other: the same are let through."""

    def test_every_decision_is_the_same(self, make_redis: Callable[..., RedisReplay]) -> None:
        config = make_config(capacity=500, min_size=20, samples_per_insert=3.0, error_buffer=50.0)
        pair: list[ReplayBuffer] = [InMemoryReplay(config, 0), make_redis(config)]
        decisions: list[list[str]] = [[], []]
        for replay, made in zip(pair, decisions, strict=True):
            for step in range(60):
                try:
                    if step % 5 < 2:
                        replay.insert(make_states(step, step + 7), writer="w", batch_id=step, timeout_s=0)
                        made.append("insert")
                    else:
                        replay.sample([Draw(9)], timeout_s=0)
                        made.append("sample")
                except WaitTimeoutError:
                    made.append("wait")
        assert decisions[0] == decisions[1]
        assert {"insert", "sample", "wait"} == set(decisions[0])
        assert pair[0].stats().cursor == pair[1].stats().cursor


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("samples_per_insert", 0), ("min_size", 0), ("error_buffer", float("inf")), ("max_staleness", 0)],
    )
    def test_a_bad_value_is_refused(self, name: str, value: float) -> None:
        with pytest.raises(ConfigError, match=f"replay.{name}: {value}; it must be"):
            LimiterSettings(1.0, 1, 1.0).changed(**{name: value})
