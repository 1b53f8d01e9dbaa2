"""States one by one, as tests look at them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_dist.models.conditioning import Conditioning
from ddil_dist.states import Array, States, integer, latent, number, text, to_tensor
from ddil_dist.types import NO_POLICY, StateSource, WeightsVersion


@dataclass(frozen=True, eq=False)
class Row:
    """One state; `policy_version` is None where there was no policy."""

    x_t: Tensor
    label: Tensor | None
    source: StateSource
    timestep: int
    policy_version: int | None
    step_index: int
    trajectory_id: int
    guidance_scale: float
    prompt: str

    @property
    def answer(self) -> Tensor:
        """The expert's, which must have been asked."""
        assert self.label is not None
        return self.label

    @property
    def seed(self) -> int:
        """Of its trajectory."""
        return random.Random(self.trajectory_id).getrandbits(62)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wider(States[Array]):
    """A record of one field more of each kind."""

    reward: Array = number(default=-1.5)
    judge: list[str] = text(default="nobody")
    seen: Array = integer(0, 200, dtype="uint8", meta="u1", default=0)
    hint: Array | None = latent(optional=True)


def rows(*states: States[Any]) -> list[Row]:
    """Every state of these batches at rest, in order."""
    return [_row(one, number) for one in states for number in range(len(one))]


def _row(states: States[Any], number: int) -> Row:
    version = int(states.policy_version[number])
    return Row(
        x_t=to_tensor(states.x_t[number]),
        label=None if states.label is None else to_tensor(states.label[number]),
        source=StateSource(int(states.source[number])),
        timestep=int(states.timestep[number]),
        policy_version=None if version == NO_POLICY else version,
        step_index=int(states.step_index[number]),
        trajectory_id=int(states.trajectory_id[number]),
        guidance_scale=float(states.guidance_scale[number]),
        prompt=states.prompt[number],
    )


def train_batch(
    x_t: Tensor,
    step_index: Tensor,
    conditioning: Conditioning,
    guidance_scale: Tensor,
    label: Tensor | None,
    source: Tensor,
    policy_version: Tensor,
    staleness: Tensor,
) -> States[Tensor]:
    """States at the learner; what no loss reads is empty."""
    num = len(x_t)
    return States(
        x_t=x_t,
        source=source,
        timestep=torch.zeros(num, dtype=torch.int64),
        policy_version=policy_version,
        step_index=step_index,
        trajectory_id=torch.zeros(num, dtype=torch.int64),
        guidance_scale=guidance_scale,
        prompt=[""] * num,
        label=label,
        staleness=staleness,
        conditioning=conditioning,
    )


def weights_at(version: int) -> WeightsVersion:
    """A published student of which only the version matters."""
    return WeightsVersion(version, 0.0, "digest", 10, "float32")
