"""Where training batches come from: the sampling prior decides, per sample, between forward diffusion and replay.

With `labels: actors` both kinds come out of replay with the expert's answer. With `labels: learner` forward states
are made here from data, and the expert is asked here, about every state of the batch, if the objective wants answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_dist.config import PriorConfig, PriorPart
from ddil_dist.data.forward import ForwardData
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.errors import RecordError, WaitTimeoutError
from ddil_dist.models.conditioning import PromptEncoder
from ddil_dist.policy import TeacherPolicy
from ddil_dist.replay.buffer import ReplayBuffer
from ddil_dist.replay.codec import Rows
from ddil_dist.replay.waits import Deadline
from ddil_dist.states import States
from ddil_dist.types import Draw, StateSource

ROLLOUT_SOURCES = frozenset({StateSource.STUDENT, StateSource.TEACHER, StateSource.NOISE})


STAND_IN_S = 5.0
"""How long any states are awaited after those of some kind were in vain."""


@dataclass
class SourceTimes:
    """Seconds that the last batch spent waiting for replay, and asking the expert."""

    wait_s: float = 0.0
    label_s: float = 0.0


class BatchSource:
    """Draws one worker's batches.

    labels_by_actors: forward states and the expert's answers come from replay. Else forward states are made here, of
    `forward` where the prior wants them, and `expert` answers here, if the objective wants it to. `next` blocks on
    replay up to `timeout_s`.

    noise_share: of rollouts' states. The prior's shares of student and teacher hold at every other grid point, where
    somebody led to the state; at the first, rollouts' share is of pure noise.

    inputs_unused: the objective makes its own x_t, and needs but captions and steps: no image is encoded, and x_t is
    pure noise of `latent_shape`.
    """

    def __init__(
        self,
        *,
        replay: ReplayBuffer,
        prior: PriorConfig,
        encoder: PromptEncoder,
        schedule: NoiseSchedule,
        timesteps: tuple[int, ...],
        batch_size: int,
        guidance: tuple[float, float],
        seed: int,
        timeout_s: float,
        device: torch.device,
        labels_by_actors: bool = True,
        noise_share: float = 0.0,
        inputs_unused: bool = False,
        latent_shape: tuple[int, int, int] | None = None,
        expert: TeacherPolicy | None = None,
        forward: ForwardData | None = None,
        is_excused: Callable[[], bool] = lambda: False,
    ) -> None:
        self._replay = replay
        self._is_excused = is_excused
        self._prior = prior
        self._encoder = encoder
        self._schedule = schedule
        self._timesteps = np.array(timesteps)
        self._batch_size = batch_size
        self._guidance = guidance
        self._generator = np.random.default_rng((seed, 1))
        self._timeout_s = timeout_s
        self._stand_in_s = min(timeout_s, max(STAND_IN_S, timeout_s / 10))
        self._device = device
        self._labels_by_actors = labels_by_actors
        self._noise_share = noise_share
        self._unused_shape = latent_shape if inputs_unused else None
        self._expert = expert
        self._forward = forward
        self._seen: set[StateSource] = set()
        self.times = SourceTimes()

    def next(self, *, progress: float, on_wait: Callable[[], None] = lambda: None) -> States[Tensor]:
        """The next batch under the prior that holds at `progress` of the run. Raises WaitTimeoutError.

        on_wait: called after every `timeout_s` that there was a reason to wait; what it raises is raised.
        """
        part = self._prior.at(progress)
        shares = self._shares(part)
        drawn = self._generator.multinomial(self._batch_size, list(shares.values())).tolist()
        wanted = dict(zip(shares, drawn, strict=True))
        num_forward = wanted[StateSource.FORWARD]
        parts = []
        begun = time.perf_counter()
        if not self._labels_by_actors:
            del wanted[StateSource.FORWARD]
        if any(wanted.values()):
            parts.append(self._from_replay(self._sample(part, wanted, on_wait)))
        sampled = time.perf_counter()
        if self._forward is not None and num_forward:
            parts.insert(0, self._diffuse(self._forward, num_forward))
        batch = self._replay.codec.kind.join(parts)
        if self._expert is not None:
            label = self._expert.solve(batch.x_t, batch.step_index, batch.conditioning, batch.guidance_scale)
            batch = replace(batch, label=label)
        self.times = SourceTimes(wait_s=sampled - begun, label_s=time.perf_counter() - sampled)
        return batch

    def _sample(self, part: PriorPart, wanted: dict[StateSource, int], on_wait: Callable[[], None]) -> States[Rows]:
        """A sample, awaited as long as the timeout says, or for as long as there is a reason to go on waiting.

        A kind may die out, or grow too old, in a buffer that takes no more: then anything stands in for it.
        """
        while True:
            deadline = Deadline(self._timeout_s)
            try:
                return self._replay.sample(self._draws(part, wanted, deadline), timeout_s=deadline.left_s)
            except WaitTimeoutError:
                self._seen.clear()
                with suppress(WaitTimeoutError):
                    anything = Draw(sum(wanted.values()), None)
                    return self._replay.sample([anything], timeout_s=self._stand_in_s)
                if not self._is_excused():
                    raise
                on_wait()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "generator": self._generator.bit_generator.state,
            "seen": sorted(int(source) for source in self._seen),
        }
        if self._forward is not None:
            state["forward"] = self._forward.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.bit_generator.state = state["generator"]
        self._seen = {StateSource(source) for source in state["seen"]}
        if self._forward is not None and "forward" in state:
            self._forward.load_state_dict(state["forward"])

    def close(self) -> None:
        """Nothing of its own to let go of."""

    def _draws(self, part: PriorPart, wanted: dict[StateSource, int], deadline: Deadline) -> list[Draw]:
        """States by who made them, as the prior wants; for a kind that has no live state yet, others stand in.

        Actors follow the prior only from the next published student on, so that a part's first batches may find none
        of a kind that the part before did without. Rollouts stand in for rollouts, and anything for anything else.
        """
        self._seen &= {kind for kind, share in self._shares(part).items() if share > 0}  # the others may die out
        wanted = {kind: num for kind, num in wanted.items() if num}
        live = self._seen
        if not live >= wanted.keys():
            stats = self._replay.stats(timeout_s=deadline.left_s)  # a server may be away for as long as a sample waits
            live = {kind for kind, num in stats.by_source.items() if num}
            self._seen |= live & wanted.keys()
        draws: dict[frozenset[StateSource] | None, int] = {}
        for kind, num in wanted.items():
            sources: frozenset[StateSource] | None = None
            if kind in self._seen:
                sources = frozenset({kind})
            elif kind in ROLLOUT_SOURCES and live & ROLLOUT_SOURCES:
                sources = ROLLOUT_SOURCES
            draws[sources] = draws.get(sources, 0) + num
        return [Draw(num, sources) for sources, num in draws.items()]

    def _shares(self, part: PriorPart) -> dict[StateSource, float]:
        """Of a batch; they sum to 1 to the last bit that `multinomial` looks at."""
        led = 1 - self._noise_share
        shares = {
            StateSource.FORWARD: part.forward,
            StateSource.STUDENT: part.student * led,
            StateSource.TEACHER: part.teacher * led,
            StateSource.NOISE: (part.student + part.teacher) * self._noise_share,
        }
        whole = sum(shares.values())
        return {kind: share / whole for kind, share in shares.items()}

    def _from_replay(self, sampled: States[Rows]) -> States[Tensor]:
        if self._labels_by_actors and sampled.label is None:
            raise RecordError(
                "replay: sampled states without the expert's answer while rollout.labels is 'actors'; the run's "
                "buffer was filled with rollout.labels=learner: start a run of another name"
            )
        batch = (sampled if self._labels_by_actors else replace(sampled, label=None)).tensors(self._device)
        return replace(batch, conditioning=self._encoder.encode(sampled.prompt))

    def _diffuse(self, forward: ForwardData, num: int) -> States[Tensor]:
        """Forward-diffused states at uniformly drawn grid points (Algorithm 1)."""
        x_0: Tensor | None = None
        if self._unused_shape is None:
            x_0, captions = forward.next(num)
            shape = tuple(x_0.shape)
        else:
            captions, shape = forward.next_captions(num), (num, *self._unused_shape)
        step_index = self._generator.integers(len(self._timesteps), size=num)
        timestep = self._timesteps[step_index]
        noise = torch.from_numpy(self._generator.standard_normal(shape, dtype=np.float32)).to(self._device)
        scales = self._generator.uniform(*self._guidance, size=num).astype(np.float32)
        t = torch.from_numpy(timestep).to(self._device)
        columns: dict[str, Any] = {
            "source": [StateSource.FORWARD] * num,
            "timestep": timestep,
            "step_index": step_index,
            "guidance_scale": scales,
            "prompt": captions,
        }
        x_t = noise if x_0 is None else self._schedule.add_noise(x_0, noise, t)
        batch = self._replay.codec.kind.of(columns, x_t=x_t, staleness=np.zeros(num, np.int64)).tensors(self._device)
        return replace(batch, conditioning=self._encoder.encode(captions))
