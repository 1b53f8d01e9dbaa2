"""The replay buffer as actors and the learner see it: DAgger's aggregated dataset D under a bound.

`InMemoryReplay` serves a run in one process, `RedisReplay` one of many; `tests/replay/test_contract.py` holds both to
this page. Sampling is with replacement, uniform over the live states that a draw's filters leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ddil_dist.errors import ConfigError
from ddil_dist.replay.codec import CARRIERS, Record
from ddil_dist.types import NO_POLICY, Draw, LatentState, ReplayStats, SampledStates


@runtime_checkable
class ReplayBuffer(Protocol):
    """Inserts exactly once, samples by strata, holds both to a ratio, and counts everything."""

    def insert(self, states: Sequence[LatentState], *, writer: str, batch_id: int, timeout_s: float) -> bool:
        """Store a batch, whole and exactly once per (writer, batch_id), however often it is retried.

        True: stored now. False: it had been stored before. A writer numbers its batches upwards from 0; a batch that
        is 32 or more behind the writer's newest can no longer be told from a stored one.
        Blocks while the rate limiter or a full or absent server holds inserts back.
        Raises RecordError for a state that breaks a rule, WaitTimeoutError or ReplayFullError at the deadline,
        ReplayError for a batch_id too far behind.
        """

    def sample(self, draws: Sequence[Draw], *, timeout_s: float) -> SampledStates:
        """States for every draw, in the draws' order.

        Blocks while the rate limiter holds samples back, and while a draw has no live state to choose from.
        Raises WaitTimeoutError at the deadline, naming who waits for whom.
        """

    def can_sample(self, num: int) -> bool:
        """Whether the rate limiter would let `num` states be sampled now."""

    def can_insert(self, num: int) -> bool:
        """Whether the rate limiter would let `num` states be inserted now."""

    def set_newest_version(self, version: int) -> None:
        """Note the newest published student: ages and the staleness bound count from it. Never goes back."""

    def configure(self, **changes: Any) -> None:
        """Change `LimiterSettings` of the running buffer, for everyone. Raises ConfigError on a bad value."""

    def stats(self) -> ReplayStats:
        """What is live and what was done."""

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


def age_of(version: int | None, newest: int) -> int:
    """Student updates between a policy version and the newest; 0 without a policy."""
    return 0 if version is None or version == NO_POLICY else max(newest - version, 0)


def fits(record: Record, draw: Draw, *, newest: int, staleness: int | None) -> bool:
    """Whether a record is one that a draw may return."""
    age = age_of(record.policy_version, newest)
    return (
        (draw.sources is None or record.source in draw.sources)
        and (draw.timesteps is None or record.timestep in draw.timesteps)
        and all(bound is None or age <= bound for bound in (staleness, draw.max_age))
        and (draw.min_age is None or age >= draw.min_age)
    )


def to_columns(records: Sequence[Record], newest: int) -> SampledStates:
    """Records of one layout as columns; each latent is copied once, into its row."""
    first = records[0]
    latents = _rows(records, [record.latent_begin for record in records])
    begins = [record.label_begin for record in records if record.label_begin is not None]
    labels = _rows(records, begins) if len(begins) == len(records) else None
    versions = [NO_POLICY if r.policy_version is None else r.policy_version for r in records]
    return SampledStates(
        latents=latents,
        latent_dtype=first.dtype,
        labels=labels,
        timesteps=np.array([r.timestep for r in records], np.int64),
        prompts=[r.prompt for r in records],
        guidance_scales=np.array([r.guidance_scale for r in records], np.float32),
        sources=np.array([r.source for r in records], np.uint8),
        policy_versions=np.array(versions, np.int64),
        step_indices=np.array([r.step_index for r in records], np.int64),
        trajectory_ids=np.array([r.trajectory_id for r in records], np.int64),
        ages=np.array([age_of(v, newest) for v in versions], np.int64),
    )


def _rows(records: Sequence[Record], begins: Sequence[int]) -> npt.NDArray[Any]:
    """[B, C, H, W]: of every record the array that begins there, copied once."""
    first = records[0]
    num_bytes = first.num_bytes
    rows = np.empty((len(records), *first.shape), CARRIERS[first.dtype])
    out = rows.reshape(-1).view(np.uint8).data
    place = 0
    for record, begin in zip(records, begins, strict=True):
        out[place : place + num_bytes] = record.data[begin : begin + num_bytes]
        place += num_bytes
    return rows
