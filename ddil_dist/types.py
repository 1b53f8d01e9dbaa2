"""The vocabulary that actors, replay and learner share. No torch, no services: plain data.

States themselves are declared in `ddil_dist.states`. `WeightsVersion` names the student that made one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

FINAL_TIMESTEP: Final = -1
"""The end of a trajectory: alpha = 1, sigma = 0. Timestep 0 of the training grid still carries a little noise."""

NO_POLICY: Final = -1
"""`policy_version` column value of a state that no student transition led to."""

LatentDtype = str
"""One of "float32", "float16", "bfloat16"."""


class StateSource(IntEnum):
    """Who made the last transition into a state. NOISE: nobody, a rollout begins there."""

    FORWARD = 0
    STUDENT = 1
    TEACHER = 2
    NOISE = 3


@dataclass(frozen=True, slots=True)
class Draw:
    """A part of a sample: how many states, from which sources (None: any) and timesteps (None: any).

    min_age, max_age    bounds, inclusive, on a state's age in student updates (None: any), as in `States.staleness`.
    """

    num: int
    sources: frozenset[StateSource] | None = None
    timesteps: frozenset[int] | None = None
    min_age: int | None = None
    max_age: int | None = None


@dataclass(frozen=True, slots=True)
class WeightsVersion:
    """Identity of one published student.

    version      student updates made before it was published; 0 is the student before training. Strictly increasing.
    progress     share of the run's updates that were done, 0..1: rollouts read the prior's schedule at it.
    digest       hex digest of the flat buffer.
    size_bytes   of the flat buffer.
    dtype        of the weights as published.
    """

    version: int
    progress: float
    digest: str
    size_bytes: int
    dtype: LatentDtype


@dataclass(frozen=True, slots=True)
class ReplayStats:
    """What the replay buffer holds and has done; every counter is exact for what is live now.

    size, size_bytes     live states and the bytes of their records.
    num_inserted         states ever inserted; num_sampled: ever sampled; num_refused: records that could not be read.
    weights              the newest published student, which ages count from; None before the first.
    by_*                 live states by source, policy version (NO_POLICY: none) and timestep; no entry is 0.
    sampled_by_source    states ever sampled, by source.
    num_unused           live states that were never sampled yet.
    inserted_by_*        states ever inserted, by timestep and by actor (`replay.buffer.actor_of`).
    used_by_*            those of them that were sampled at least once; the rest never, and may be gone.
    capacity_bytes       bound on `size_bytes`.
    settings             the rate limiter's, by name.
    cursor               inserts * samples_per_insert - samples, and the bounds that it is held to.
    waits_s              seconds that "who for what" waited since the run began, such as "sample for inserts".
    incarnation          changes when the server has lost its data.
    num_shards           servers or hash tags that the states are spread over.
    num_samplers         clients that sampled, and num_inserters: that inserted, in the last 15 s.
    """

    size: int
    size_bytes: int
    capacity: int
    num_inserted: int
    num_sampled: int
    num_refused: int
    by_source: Mapping[StateSource, int]
    by_version: Mapping[int, int]
    by_timestep: Mapping[int, int]
    sampled_by_source: Mapping[StateSource, int] = field(default_factory=dict)
    num_unused: int = 0
    inserted_by_timestep: Mapping[int, int] = field(default_factory=dict)
    used_by_timestep: Mapping[int, int] = field(default_factory=dict)
    inserted_by_actor: Mapping[str, int] = field(default_factory=dict)
    used_by_actor: Mapping[str, int] = field(default_factory=dict)
    capacity_bytes: int = 0
    settings: Mapping[str, float | None] = field(default_factory=dict)
    cursor: float = 0.0
    cursor_bounds: tuple[float, float] = (0.0, 0.0)
    waits_s: Mapping[str, float] = field(default_factory=dict)
    incarnation: str = ""
    num_shards: int = 1
    num_samplers: int = 0
    num_inserters: int = 0
    weights: WeightsVersion | None = None

    @property
    def newest_version(self) -> int:
        """The student version that ages count from; 0 before the first."""
        return 0 if self.weights is None else self.weights.version
