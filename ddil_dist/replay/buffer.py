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


class Columns:
    """A sample in the making: `num` rows, each missing until a record is put there; its latents are copied once."""

    def __init__(self, num: int) -> None:
        self._records: list[tuple[Any, ...] | None] = [None] * num
        self._dtype = ""
        self._shape: tuple[int, int, int] = (0, 0, 0)
        self._num_bytes = 0
        self._latents: npt.NDArray[Any] | None = None
        self._labels: npt.NDArray[Any] | None = None
        self._latent_bytes = self._label_bytes = memoryview(b"")

    def missing(self) -> list[int]:
        """Rows that nothing was put into."""
        return [row for row, record in enumerate(self._records) if record is None]

    def like(self, record: Record) -> bool:
        """Whether the rows so far have this record's dtype and shape."""
        return record.shape == self._shape and record.dtype == self._dtype

    def put(self, row: int, record: Record) -> None:
        """Fill a row; what was there before is gone."""
        if self._latents is None:
            self._dtype, self._shape, self._num_bytes = record.dtype, record.shape, record.num_bytes
            self._latents, self._latent_bytes = self._empty()
        num_bytes = self._num_bytes
        place = row * num_bytes
        self._latent_bytes[place : place + num_bytes] = record.data[record.latent_begin :][:num_bytes]
        if record.label_begin is not None:
            if self._labels is None:
                self._labels, self._label_bytes = self._empty()
            self._label_bytes[place : place + num_bytes] = record.data[record.label_begin :][:num_bytes]
        self._records[row] = (
            record.timestep,
            record.prompt,
            record.guidance_scale,
            record.source,
            NO_POLICY if record.policy_version is None else record.policy_version,
            record.step_index,
            record.trajectory_id,
            record.label_begin is not None,
        )

    def clear(self) -> None:
        """Every row is missing again."""
        self._records = [None] * len(self._records)

    def build(self, newest: int) -> SampledStates:
        """The sample; no row may be missing. newest: the version that ages count from."""
        assert self._latents is not None
        rows = [record for record in self._records if record is not None]
        assert len(rows) == len(self._records), "rows are missing"
        timesteps, prompts, guidance_scales, sources, versions, step_indices, trajectories, labelled = zip(
            *rows, strict=True
        )
        policy_versions = np.array(versions, np.int64)
        return SampledStates(
            latents=self._latents,
            latent_dtype=self._dtype,
            labels=self._labels if all(labelled) else None,
            timesteps=np.array(timesteps, np.int64),
            prompts=list(prompts),
            guidance_scales=np.array(guidance_scales, np.float32),
            sources=np.array(sources, np.uint8),
            policy_versions=policy_versions,
            step_indices=np.array(step_indices, np.int64),
            trajectory_ids=np.array(trajectories, np.int64),
            ages=np.where(policy_versions == NO_POLICY, 0, np.maximum(newest - policy_versions, 0)),
        )

    def _empty(self) -> tuple[npt.NDArray[Any], memoryview]:
        """[B, C, H, W] to be filled, and its bytes."""
        rows = np.empty((len(self._records), *self._shape), CARRIERS[self._dtype])
        return rows, rows.reshape(-1).view(np.uint8).data
