"""The rollout engine: continuous batching of mixed teacher/student trajectories. No Ray, no Redis.

A U-Net takes a timestep per sample, so trajectories need not move in step. The engine keeps a pool of slots, each a
trajectory (or a single forward-diffused state) somewhere on its way, that wants either a teacher substep or a student
step. Each tick makes one network call: the student's as soon as enough slots want it, else the teacher's. A pool as
large as both batches together always holds one full batch of one kind (pigeonhole), so every call is full and shapes
are static whatever the mixing probability. Student batches are small where the expert is asked at every state: student
steps are rare then, and slots that wait for a large one would come in bursts of one policy version.

Algorithms 2 and 3: at every student grid point a Bernoulli draw says who makes the next transition, the student in
one step or the teacher in K guided substeps, and the state at the grid point enters the aggregated dataset. With
labels the expert is asked at every state, as in DAgger; where the teacher also makes the transition, its answer is
the label, so it costs nothing extra.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddil_dist.data.forward import ForwardData
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.latents import to_latent
from ddil_dist.models.conditioning import Conditioning, PromptEncoder
from ddil_dist.policy import StudentPolicy, TeacherPolicy
from ddil_dist.types import LatentState, StateSource

TEACHER_LABEL = "teacher"


@dataclass(frozen=True)
class RolloutSettings:
    """What the engine rolls out.

    batch_size           rows of a teacher call (guided, it runs twice as many through the network).
    student_batch_size   rows of a student call.
    labels               ask the expert at every state, and make forward-diffused states too.
    guidance             range that each trajectory's guidance scale is drawn from.
    seed                 of this engine; trajectories of two engines with different seeds differ.
    """

    batch_size: int
    student_batch_size: int
    labels: bool
    guidance: tuple[float, float]
    seed: int


@dataclass
class RolloutCounters:
    """Totals since the engine was made. Batch fill is rows / places, the rows that its calls had room for."""

    states: int = 0
    trajectories: int = 0
    teacher_calls: int = 0
    student_calls: int = 0
    rows: int = 0
    places: int = 0
    network_s: float = 0.0
    tick_s: float = 0.0


@dataclass
class _Slot:
    """The plain-data half of a slot; its tensors are rows of the pool."""

    trajectory_id: int
    seed: int
    prompt: str
    guidance_scale: float
    draws: random.Random
    source: StateSource
    policy_version: int | None = None
    step_index: int = 0
    student_next: bool = False


@dataclass
class _Pool:
    """Tensors of P slots. `state` is x_t at the slot's grid point, `solver` the teacher's latent on its way from it."""

    state: Tensor
    solver: Tensor
    substep: Tensor
    step_index: Tensor
    guidance_scale: Tensor
    conditioning: Conditioning
    slots: list[_Slot] = field(default_factory=list)


class RolloutEngine:
    """Makes labelled or bare `LatentState`s with the policies it is given.

    Use: `engine.set_policy(version, prior)` at each new student version, then `states = engine.tick()` for ever.
    The student's weights may change between ticks: a version boundary is a transition boundary.
    """

    def __init__(
        self,
        *,
        teacher: TeacherPolicy,
        student: StudentPolicy,
        schedule: NoiseSchedule,
        encoder: PromptEncoder,
        prompts: Sequence[str],
        forward: ForwardData | None,
        latent_shape: tuple[int, int, int],
        device: torch.device,
        settings: RolloutSettings,
    ) -> None:
        assert prompts, "rollouts need prompts"
        assert forward is None or settings.labels, "forward-diffused states are only worth sending with their labels"
        self._teacher = teacher
        self._student = student
        self._schedule = schedule
        self._encoder = encoder
        self._prompts = prompts
        self._forward = forward
        self._latent_shape = latent_shape
        self._device = device
        self._settings = settings
        self._grid = student.grid
        self._version = 0
        self._student_probability = 0.0
        self._forward_share = 0.0
        self._started = 0
        self._begun = {StateSource.FORWARD: 0.0, StateSource.MIXED: 0.0}
        self._wants_teacher: list[int] = []
        self._wants_student: list[int] = []
        self._finished: list[int] = []
        self._pool: _Pool | None = None
        self.counters = RolloutCounters()

    def set_policy(self, version: int, *, student_probability: float, forward_share: float) -> None:
        """From the next transition on: the student's version, how often it acts, and the share of forward states."""
        self._version = version
        self._student_probability = student_probability
        forward_share = forward_share if self._forward is not None else 0.0
        if forward_share != self._forward_share:
            # The new share holds from here; what was begun under the old one is not made up for.
            self._begun = {StateSource.FORWARD: 0.0, StateSource.MIXED: 0.0}
        self._forward_share = forward_share

    @torch.no_grad()
    def tick(self) -> list[LatentState]:
        """One full network call; the states that it completed, in no particular order."""
        start = time.perf_counter()
        states: list[LatentState] = []
        if self._pool is None:
            states += self._fill_pool()
        if len(self._wants_student) >= self._settings.student_batch_size:
            states += self._student_tick(self._take(self._wants_student, self._settings.student_batch_size))
        elif self._wants_teacher:  # empty only for one step without labels: a trajectory is over where it begins
            states += self._teacher_tick(self._take(self._wants_teacher, self._settings.batch_size))
        states += self._restart_finished()
        self.counters.states += len(states)
        self.counters.tick_s += time.perf_counter() - start
        return states

    def _take(self, queue: list[int], size: int) -> list[int]:
        """Remove the `size` slots that have waited longest."""
        rows = queue[:size]
        del queue[:size]
        self.counters.rows += len(rows)
        self.counters.places += size
        return rows

    def _teacher_tick(self, rows: list[int]) -> list[LatentState]:
        pool = self._require_pool()
        index = torch.tensor(rows, device=self._device)
        begun = time.perf_counter()
        pool.solver[index] = self._teacher.substep(
            pool.solver[index],
            pool.step_index[index],
            pool.substep[index],
            pool.conditioning.select(index),
            pool.guidance_scale[index],
        )
        self._count_call("teacher", begun)
        pool.substep[index] += 1
        solved = (pool.substep[index] == self._grid.substeps).tolist()
        self._wants_teacher += [row for row, done in zip(rows, solved, strict=True) if not done]
        return self._answered([row for row, done in zip(rows, solved, strict=True) if done])

    def _answered(self, rows: list[int]) -> list[LatentState]:
        """The expert has answered at these slots' states: emit them labelled, and go on as the draw said."""
        pool = self._require_pool()
        states: list[LatentState] = []
        advancing = []
        for row in rows:
            slot = pool.slots[row]
            if self._settings.labels:
                states.append(self._emit(row, label=pool.solver[row]))
            if slot.source is StateSource.FORWARD or slot.step_index == self._grid.num_steps - 1:
                self._finished.append(row)
            elif slot.student_next:
                self._wants_student.append(row)
            else:
                advancing.append(row)
        return states + self._advance(advancing, pool.solver[advancing], StateSource.TEACHER)

    def _student_tick(self, rows: list[int]) -> list[LatentState]:
        pool = self._require_pool()
        index = torch.tensor(rows, device=self._device)
        begun = time.perf_counter()
        latents = self._student.step(
            pool.state[index], pool.step_index[index], pool.conditioning.select(index), pool.guidance_scale[index]
        )
        self._count_call("student", begun)
        return self._advance(rows, latents, StateSource.STUDENT)

    def _advance(self, rows: list[int], latents: Tensor, source: StateSource) -> list[LatentState]:
        """Put slots on their next grid point, at `latents` [len(rows), C, H, W], made by `source`."""
        if not rows:
            return []
        pool = self._require_pool()
        pool.state[rows] = latents
        for row in rows:
            slot = pool.slots[row]
            slot.source = source
            slot.step_index += 1
            if source is StateSource.STUDENT:
                slot.policy_version = self._version
        return self._arrive(rows)

    def _arrive(self, rows: list[int]) -> list[LatentState]:
        """Slots stand at a grid point: draw who acts next, and queue them. Without labels the state is due now."""
        pool = self._require_pool()
        states: list[LatentState] = []
        for row in rows:
            slot = pool.slots[row]
            pool.step_index[row] = slot.step_index
            slot.student_next = slot.draws.random() < self._student_probability
            if slot.step_index == 0 and slot.source is not StateSource.FORWARD:
                # Pure noise is nobody's state; it counts as its trajectory's first policy's.
                slot.source = StateSource.STUDENT if slot.student_next else StateSource.TEACHER
            if not self._settings.labels:
                states.append(self._emit(row, label=None))
                if slot.step_index == self._grid.num_steps - 1:
                    self._finished.append(row)
                    continue
            if slot.student_next and not self._settings.labels:
                self._wants_student.append(row)
            else:
                pool.solver[row] = pool.state[row]
                pool.substep[row] = 0
                self._wants_teacher.append(row)
        return states

    def _restart_finished(self) -> list[LatentState]:
        rows, self._finished = self._finished, []
        self.counters.trajectories += len(rows)
        return self._start(rows)

    def _fill_pool(self) -> list[LatentState]:
        num = self._settings.batch_size + self._settings.student_batch_size
        embeddings = self._encoder.encode([""]).expand(num).embeddings.clone()
        self._pool = _Pool(
            state=torch.zeros(num, *self._latent_shape, device=self._device),
            solver=torch.zeros(num, *self._latent_shape, device=self._device),
            substep=torch.zeros(num, dtype=torch.int64, device=self._device),
            step_index=torch.zeros(num, dtype=torch.int64, device=self._device),
            guidance_scale=torch.ones(num, device=self._device),
            conditioning=Conditioning(embeddings),
            slots=[None] * num,  # type: ignore[list-item]  # each is set by _start, below
        )
        return self._start(list(range(num)))

    def _start(self, rows: list[int]) -> list[LatentState]:
        """Begin a new trajectory, or a forward-diffused state, in each of these slots."""
        if not rows:
            return []
        pool = self._require_pool()
        for row in rows:
            pool.slots[row], pool.state[row] = self._begin()
            pool.guidance_scale[row] = pool.slots[row].guidance_scale
        pool.conditioning.assign(
            torch.tensor(rows, device=self._device), self._encoder.encode([pool.slots[row].prompt for row in rows])
        )
        return self._arrive(rows)

    def _begin(self) -> tuple[_Slot, Tensor]:
        """A fresh slot and its x_t. Everything about it follows from its seed (and, for forward states, the data)."""
        trajectory_id = (self._settings.seed << 32) + self._started
        self._started += 1
        seed = random.Random(trajectory_id).getrandbits(62)
        draws = random.Random(seed)
        noise = torch.randn(self._latent_shape, generator=torch.Generator().manual_seed(seed)).to(self._device)
        low, high = self._settings.guidance
        slot = _Slot(
            trajectory_id=trajectory_id,
            seed=seed,
            prompt=self._prompts[draws.randrange(len(self._prompts))],
            guidance_scale=draws.uniform(low, high),
            draws=draws,
            source=StateSource.MIXED,
        )
        if not self._forward_is_due():
            return slot, noise
        assert self._forward is not None
        (x_0,), (slot.prompt,) = self._forward.next(1)
        slot.source = StateSource.FORWARD
        slot.step_index = draws.randrange(self._grid.num_steps)
        t = torch.tensor([self._grid.student[slot.step_index]], device=self._device)
        return slot, self._schedule.add_noise(x_0.unsqueeze(0), noise.unsqueeze(0), t)[0]

    def _forward_is_due(self) -> bool:
        """Whether the next slot should hold a forward state, so that states keep the wanted share of forward ones.

        A trajectory yields one state a grid point, a forward slot one state.
        """
        share = self._forward_share
        forward, mixed = self._begun[StateSource.FORWARD], self._begun[StateSource.MIXED]
        due = share > 0 and forward * (1 - share) <= mixed * share
        self._begun[StateSource.FORWARD if due else StateSource.MIXED] += 1 if due else self._grid.num_steps
        return due

    def _emit(self, row: int, *, label: Tensor | None) -> LatentState:
        pool = self._require_pool()
        slot = pool.slots[row]
        return LatentState(
            latent=to_latent(pool.state[row]),
            timestep=self._grid.student[slot.step_index],
            prompt=slot.prompt,
            guidance_scale=slot.guidance_scale,
            source=slot.source,
            policy_version=slot.policy_version,
            trajectory_id=slot.trajectory_id,
            step_index=slot.step_index,
            seed=slot.seed,
            label=None if label is None else to_latent(label),
            label_version=None if label is None else TEACHER_LABEL,
        )

    def _count_call(self, policy: str, begun: float) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.counters.network_s += time.perf_counter() - begun
        if policy == "teacher":
            self.counters.teacher_calls += 1
        else:
            self.counters.student_calls += 1

    def _require_pool(self) -> _Pool:
        assert self._pool is not None
        return self._pool
