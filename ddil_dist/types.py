"""The vocabulary that actors, replay and learner share. No torch, no services: plain data.

A rollout actor visits states and inserts `LatentState`s; replay hands them back as the columns of a `SampledStates`;
the learner turns those, and states that it diffused forward itself, into a `TrainBatch` (`learner/batch.py`, which
needs torch). `WeightsVersion` names the student that made a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

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
class Latent:
    """A latent tensor at rest: raw bytes with a shape, so that bfloat16 needs no torch.

    `array` is [C, H, W]: float32, float16, or uint16 holding bfloat16 bit patterns when `dtype` says so.
    """

    array: npt.NDArray[Any]
    dtype: LatentDtype


@dataclass(frozen=True, slots=True)
class LatentState:
    """One state of the imitation problem, (x_t, t, prompt), and where it came from: a replay record.

    latent             [C, H, W], x_t, VAE-scaled.
    timestep           t on the training grid, 0..999.
    prompt             text of any length; "" is the unconditional prompt.
    guidance_scale     w of x_uncond + w (x_cond - x_uncond); 1 means none.
    source             who led here.
    policy_version     student version of the newest student transition on the way here; None if there was none.
    trajectory_id      unique within a run; a forward-diffused state is a trajectory of its own.
    step_index         position on the student grid, 0 at pure noise.
    seed               seeds the trajectory's noise and its policy draws.
    label              [C, H, W], the expert's answer here: x_s at the student's next grid point; None if not asked.
    label_version      what made the label, e.g. "teacher"; None without label.
    """

    latent: Latent
    timestep: int
    prompt: str
    guidance_scale: float
    source: StateSource
    policy_version: int | None
    trajectory_id: int
    step_index: int
    seed: int
    label: Latent | None = None
    label_version: str | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """A part of a sample: how many states, from which sources (None: any) and timesteps (None: any).

    min_age, max_age    bounds, inclusive, on a state's age in student updates (None: any), as in `SampledStates.ages`.
    """

    num: int
    sources: frozenset[StateSource] | None = None
    timesteps: frozenset[int] | None = None
    min_age: int | None = None
    max_age: int | None = None


@dataclass(frozen=True, slots=True)
class SampledStates:
    """A sample from replay, in columns, in the order of the draws that asked for it. B states.

    latents            [B, C, H, W], bit patterns as in `Latent`.
    latent_dtype       of `latents` and `labels`.
    labels             [B, C, H, W] or None; None unless every state of the sample has one.
    timesteps          [B] int64.
    prompts            B texts.
    guidance_scales    [B] float32.
    sources            [B] uint8, `StateSource` values.
    policy_versions    [B] int64, NO_POLICY where no student acted.
    step_indices       [B] int64.
    trajectory_ids     [B] int64.
    ages               [B] int64, student updates between a state's policy and the newest version; 0 for NO_POLICY.
    """

    latents: npt.NDArray[Any]
    latent_dtype: LatentDtype
    labels: npt.NDArray[Any] | None
    timesteps: npt.NDArray[np.int64]
    prompts: list[str]
    guidance_scales: npt.NDArray[np.float32]
    sources: npt.NDArray[np.uint8]
    policy_versions: npt.NDArray[np.int64]
    step_indices: npt.NDArray[np.int64]
    trajectory_ids: npt.NDArray[np.int64]
    ages: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompts)


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
    newest_version       student version that ages count from.
    by_*                 live states by source, policy version (NO_POLICY: none) and timestep; no entry is 0.
    sampled_by_source    states ever sampled, by source.
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
    newest_version: int
    by_source: Mapping[StateSource, int]
    by_version: Mapping[int, int]
    by_timestep: Mapping[int, int]
    sampled_by_source: Mapping[StateSource, int] = field(default_factory=dict)
    capacity_bytes: int = 0
    settings: Mapping[str, float | None] = field(default_factory=dict)
    cursor: float = 0.0
    cursor_bounds: tuple[float, float] = (0.0, 0.0)
    waits_s: Mapping[str, float] = field(default_factory=dict)
    incarnation: str = ""
    num_shards: int = 1
    num_samplers: int = 0
    num_inserters: int = 0
