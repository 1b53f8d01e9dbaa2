"""The trajectories in flight: what each one is (`Slot`), and their tensors side by side (`Pool`)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_dist.methods.rollouts import Path
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.types import StateSource

PLAIN_FIELDS = (
    *("trajectory_id", "seed", "prompt", "guidance_scale", "first_recorded"),
    *("policy_version", "stop", "student_next", "substep"),
)
"""Fields of a slot that are numbers, texts or None."""


@dataclass(slots=True)
class Slot:
    """One trajectory, or a single forward-diffused state, as plain data; its tensors are a row of the pool.

    draws, generator   its random numbers: choices, and noise. Nothing else decides about it but the policies.
    path               grid positions of its stops; `stop` is where it stands.
    first_recorded     its states are recorded from this stop on.
    source             who made the last transition; NOISE before there was one.
    policy_version     student version of the newest student transition; None before one.
    student_next       who makes the next transition.
    substep            teacher substeps that its solve from here has made.
    """

    trajectory_id: int
    seed: int
    prompt: str
    guidance_scale: float
    draws: random.Random
    generator: torch.Generator
    path: Path
    first_recorded: int
    source: StateSource
    policy_version: int | None = None
    stop: int = 0
    student_next: bool = False
    substep: int = 0

    @property
    def step_index(self) -> int:
        """Its position on the grid."""
        return self.path[self.stop]

    @property
    def next_index(self) -> int:
        """The position that its next transition leads to; not at the last stop."""
        return self.path[self.stop + 1]

    @property
    def at_end(self) -> bool:
        return self.stop == len(self.path) - 1

    @property
    def recorded(self) -> bool:
        """Whether the state that it stands at is one to insert."""
        return self.stop >= self.first_recorded

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        plain = {name: getattr(self, name) for name in PLAIN_FIELDS}
        return {
            **plain,
            "draws": self.draws.getstate(),
            "generator": self.generator.get_state(),
            "path": list(self.path),
            "source": int(self.source),
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Slot:
        """The slot that `state_dict` described."""
        draws, generator = random.Random(), torch.Generator()
        draws.setstate(state["draws"])
        generator.set_state(state["generator"])
        return Slot(
            **{name: state[name] for name in PLAIN_FIELDS},
            draws=draws,
            generator=generator,
            path=tuple(state["path"]),
            source=StateSource(state["source"]),
        )


@dataclass
class Pool:
    """P slots, and their tensors row by row.

    state           [P, C, H, W] float32, x_t where the slot stands.
    solver          [P, C, H, W] float32, the teacher's latent on its way from there.
    guidance_scale  [P] float32.
    conditioning    P encoded prompts.
    """

    state: Tensor
    solver: Tensor
    guidance_scale: Tensor
    conditioning: Conditioning
    slots: list[Slot]
