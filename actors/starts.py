"""Where trajectories start: from pure noise, or as forward-diffused data, each from a seed of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from actors.pool import Slot
from ddil_dist.data.forward import ForwardData
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.methods.rollouts import RolloutMode
from ddil_dist.sampling import draw_noise, seeded
from ddil_dist.types import StateSource

Record = Literal["all", "last"]


class Starts:
    """Begins trajectories; the n-th is the same whatever pool it goes into, under one share of forward states.

    guidance: range that a trajectory's scale is drawn from. forward: None where forward states are not wanted.
    """

    def __init__(
        self,
        *,
        seed: int,
        mode: RolloutMode,
        record: Record,
        grid: TrajectoryGrid,
        schedule: NoiseSchedule,
        prompts: Sequence[str],
        guidance: tuple[float, float],
        forward: ForwardData | None,
        latent_shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        assert prompts, "rollouts need prompts"
        self._seed = seed
        self._mode = mode
        self._record: Record = record
        self._grid = grid
        self._schedule = schedule
        self._prompts = prompts
        self._guidance = guidance
        self._forward = forward
        self._latent_shape = latent_shape
        self._device = device
        self._started = 0
        self._forward_share = 0.0
        self._begun_forward = self._begun_rollouts = 0

    def set_forward_share(self, share: float) -> None:
        """The share of states that are to be forward ones, from the next start on; none is made up for."""
        share = share if self._forward is not None else 0.0
        if share != self._forward_share:
            self._begun_forward = self._begun_rollouts = 0
        self._forward_share = share

    def next(self, num: int) -> tuple[list[Slot], Tensor]:
        """`num` new slots and their x_t [num, C, H, W] float32 on the device."""
        slots = [self._begin() for _ in range(num)]
        x_t = draw_noise([slot.generator for slot in slots], self._latent_shape, self._device)
        rows = [row for row, slot in enumerate(slots) if slot.source is StateSource.FORWARD]
        if rows:
            x_t[rows] = self._diffuse([slots[row] for row in rows], x_t[rows])
        return slots, x_t

    def state_dict(self) -> dict[str, Any]:
        """How far it is, as plain data."""
        return {
            "started": self._started,
            "forward_share": self._forward_share,
            "begun_forward": self._begun_forward,
            "begun_rollouts": self._begun_rollouts,
            "forward": None if self._forward is None else self._forward.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._started = state["started"]
        self._forward_share = state["forward_share"]
        self._begun_forward, self._begun_rollouts = state["begun_forward"], state["begun_rollouts"]
        if self._forward is not None and state["forward"] is not None:
            self._forward.load_state_dict(state["forward"])

    def _begin(self) -> Slot:
        """A fresh slot, all of it a function of its seed."""
        trajectory_id = (self._seed << 32) + self._started
        self._started += 1
        seed = random.Random(trajectory_id).getrandbits(62)
        draws = random.Random(seed)
        prompt = self._prompts[draws.randrange(len(self._prompts))]
        guidance_scale = draws.uniform(*self._guidance)
        forward = self._forward_is_due()
        path = (draws.randrange(self._grid.num_steps),) if forward else self._mode.path(draws)
        first_recorded = 0 if self._record == "all" else len(path) - 1
        if forward:
            self._begun_forward += 1
        else:
            self._begun_rollouts += len(path) - first_recorded
        return Slot(
            trajectory_id=trajectory_id,
            seed=seed,
            prompt=prompt,
            guidance_scale=guidance_scale,
            draws=draws,
            generator=seeded([seed])[0],
            path=path,
            first_recorded=first_recorded,
            source=StateSource.FORWARD if forward else StateSource.NOISE,
        )

    def _forward_is_due(self) -> bool:
        """Whether the next slot should hold a forward state, so that recorded states keep the wanted share of them."""
        share = self._forward_share
        return share > 0 and self._begun_forward * (1 - share) <= self._begun_rollouts * share

    def _diffuse(self, slots: Sequence[Slot], noise: Tensor) -> Tensor:
        """The data's next latents, diffused to where the slots stand; the slots take its captions."""
        assert self._forward is not None
        x_0, captions = self._forward.next(len(slots))
        for slot, caption in zip(slots, captions, strict=True):
            slot.prompt = caption
        t = torch.tensor([self._grid.student[slot.step_index] for slot in slots], device=self._device)
        return self._schedule.add_noise(x_0, noise, t)
