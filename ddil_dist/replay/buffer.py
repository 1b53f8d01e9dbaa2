"""The replay buffer as actors and the learner see it: DAgger's aggregated dataset D under a bound.

`InMemoryReplay` serves a run in one process, `RedisReplay` one of many; `tests/replay/test_contract.py` holds both to
this page. Sampling is with replacement, uniform over the live states that a draw's filters leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from ddil_dist.errors import ConfigError
from ddil_dist.replay.codec import Codec, Record, Rows
from ddil_dist.states import States
from ddil_dist.types import NO_POLICY, Draw, ReplayStats, WeightsVersion


@runtime_checkable
class ReplayBuffer(Protocol):
    """Inserts exactly once, samples by strata, holds both to a ratio, and counts everything.

    codec    of its records; its `kind` is what `sample` returns.
    """

    codec: Codec

    def insert(self, states: States[Rows], *, writer: str, batch_id: int, timeout_s: float) -> bool:
        """Store a batch, whole and exactly once per (writer, batch_id), however often it is retried.

        True: stored now. False: it had been stored before. A writer numbers its batches upwards from 0; a batch that
        is 32 or more behind the writer's newest can no longer be told from a stored one.
        Blocks while the rate limiter or a full or absent server holds inserts back.
        Raises RecordError for a state that breaks a rule, WaitTimeoutError or ReplayFullError at the deadline,
        ReplayError for a batch_id too far behind.
        """

    def sample(self, draws: Sequence[Draw], *, timeout_s: float) -> States[Rows]:
        """States for every draw, in the draws' order.

        Blocks while the rate limiter holds samples back, and while a draw has no live state to choose from.
        Raises WaitTimeoutError at the deadline, naming who waits for whom.
        """

    def can_sample(self, num: int) -> bool:
        """Whether the rate limiter would let `num` states be sampled now."""

    def can_insert(self, num: int) -> bool:
        """Whether the rate limiter would let `num` states be inserted now."""

    def note_weights(self, newest: WeightsVersion) -> None:
        """Note what the weight store holds: ages and the staleness bound count from it. Never goes back."""

    def configure(self, **changes: Any) -> None:
        """Change `LimiterSettings` of the running buffer, for everyone. Raises ConfigError on a bad value."""

    def stats(self, *, timeout_s: float | None = None) -> ReplayStats:
        """What is live and what was done. timeout_s: for a server that is away; None: what small exchanges have.

        Raises WaitTimeoutError.
        """

    def close(self) -> None:
        """Let go of connections. The states stay where they are."""


def check_draws(draws: Sequence[Draw]) -> int:
    """Number of states that the draws ask for; raises ConfigError for a draw that can match nothing."""
    for draw in draws:
        if draw.num < 0 or draw.sources == frozenset() or draw.timesteps == frozenset():
            raise ConfigError(f"{draw} asks for nothing: num must be >= 0, sources and timesteps None or not empty")
    total = sum(draw.num for draw in draws)
    if total < 1:
        raise ConfigError("a sample of no states: ask for at least one")
    return total


def describe_draw(draw: Draw) -> str:
    """A draw's filters in words, for messages."""
    parts = []
    if draw.sources is not None:
        parts.append("source " + " or ".join(sorted(s.name.lower() for s in draw.sources)))
    if draw.timesteps is not None:
        some = sorted(draw.timesteps)
        parts.append("timestep " + ", ".join(map(str, some[:8])) + (", ..." if len(some) > 8 else ""))
    if draw.min_age is not None or draw.max_age is not None:
        parts.append(f"age {draw.min_age or 0} to {'any' if draw.max_age is None else draw.max_age}")
    return " and ".join(parts) or "any state"


def actor_of(writer: str) -> str:
    """Who a writer is through all its lives: its name up to the last dot."""
    return writer.rpartition(".")[0] or writer


def fits(record: Record, draw: Draw, *, newest: int, staleness: int | None) -> bool:
    """Whether a record is one that a draw may return."""
    source, timestep, version = record.meta[:3]
    age = 0 if version == NO_POLICY else max(newest - version, 0)
    return (
        (draw.sources is None or source in draw.sources)
        and (draw.timesteps is None or timestep in draw.timesteps)
        and all(bound is None or age <= bound for bound in (staleness, draw.max_age))
        and (draw.min_age is None or age >= draw.min_age)
    )
