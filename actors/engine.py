"""The rollout engine: continuous batching of teacher and student trajectories. No Ray, no Redis.

A U-Net takes a timestep per sample, so trajectories need not move in step. The engine keeps a pool of slots, each a
trajectory (or a single forward-diffused state) somewhere on its way, that wants either a teacher substep or a student
step. Each tick makes one network call: the student's as soon as enough slots want it, else the teacher's. A pool as
large as both batches together always holds one full batch of one kind (pigeonhole), so every call is full and shapes
are static whatever the mixing probability. Student batches are small where the expert is asked at every state: student
steps are rare then, and slots that wait for a large one would come in bursts of one policy version.

Where a trajectory stops and who moves it on is the mode's business (`ddil_dist.methods.rollouts`), where it starts
that of `Starts`.
The states at its stops enter the aggregated dataset. With labels the expert is asked at every one of them, as in
DAgger; where the teacher also makes the transition, its answer is the label, so it costs nothing extra.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from actors.pool import Pool, Slot
from actors.starts import Record, Starts
from ddil_dist.data.forward import ForwardData
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.methods.rollouts import MixedMode, RolloutMode
from ddil_dist.models.conditioning import PromptEncoder
from ddil_dist.policy import StudentPolicy, TeacherPolicy
from ddil_dist.sampling import draw_noise
from ddil_dist.states import States, at_rest
from ddil_dist.types import NO_POLICY, LatentDtype, StateSource


@dataclass(frozen=True)
class RolloutSettings:
    """What the engine rolls out.

    batch_size           rows of a teacher call (guided, it runs twice as many through the network).
    student_batch_size   rows of a student call.
    labels               ask the expert at every recorded state, and make forward-diffused states too.
    guidance             range that each trajectory's guidance scale is drawn from.
    seed                 of this engine; trajectories of two engines with different seeds differ.
    mode                 where trajectories stop, and who moves them on; None: mixed, over the whole grid.
    record               the states of all of a trajectory's stops, or of its last.
    latent_dtype         of latents in the states.
    """

    batch_size: int
    student_batch_size: int
    labels: bool
    guidance: tuple[float, float]
    seed: int
    mode: RolloutMode | None = None
    record: Record = "all"
    latent_dtype: LatentDtype = "float32"


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


class RolloutEngine:
    """Makes labelled or bare `States` with the policies it is given.

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
        assert forward is None or settings.labels, "forward-diffused states are only worth sending with their labels"
        self._teacher = teacher
        self._student = student
        self._encoder = encoder
        self._device = device
        self._settings = settings
        self._grid = student.grid
        self._mode = settings.mode or MixedMode(student.grid.num_steps - 1)
        self._starts = Starts(
            seed=settings.seed,
            mode=self._mode,
            record=settings.record,
            grid=student.grid,
            schedule=schedule,
            prompts=prompts,
            guidance=settings.guidance,
            forward=forward,
            latent_shape=latent_shape,
            device=device,
        )
        self._version = 0
        self._student_probability = 0.0
        self._wants_teacher: list[int] = []
        self._wants_student: list[int] = []
        self._finished: list[int] = []
        self._pool: Pool | None = None
        self._made: list[States[Any]] = []
        self._on_device: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.counters = RolloutCounters()

    def set_policy(self, version: int, *, student_probability: float, forward_share: float) -> None:
        """From the next transition on: the student's version, how often it acts, and the share of forward states."""
        self._version = version
        self._student_probability = student_probability
        self._starts.set_forward_share(forward_share)

    @torch.no_grad()
    def tick(self) -> list[States[Any]]:
        """One full network call; the states that it completed, as they came, at rest."""
        begun = time.perf_counter()
        if self._pool is None:
            self._pool = self._new_pool()
            self._arrive(self._pool, range(len(self._pool.slots)))
        if len(self._wants_student) >= self._settings.student_batch_size:
            self._student_tick(self._pool, self._take(self._wants_student, self._settings.student_batch_size))
        elif self._wants_teacher:  # empty only for one step without labels: a trajectory is over where it begins
            self._teacher_tick(self._pool, self._take(self._wants_teacher, self._settings.batch_size))
        self._restart_finished(self._pool)
        made, self._made = self._made, []
        self.counters.states += sum(map(len, made))
        self.counters.tick_s += time.perf_counter() - begun
        return made

    def state_dict(self) -> dict[str, Any]:
        """Every trajectory in flight and what decides about the next ones, as plain data and tensors."""
        pool = self._pool
        return {
            "version": self._version,
            "student_probability": self._student_probability,
            "starts": self._starts.state_dict(),
            "queues": [self._wants_teacher, self._wants_student, self._finished],
            "counters": asdict(self.counters),
            "slots": None if pool is None else [slot.state_dict() for slot in pool.slots],
            "tensors": None if pool is None else {"state": pool.state, "solver": pool.solver},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the student's weights are the caller's to bring back."""
        self._version = state["version"]
        self._student_probability = state["student_probability"]
        self._starts.load_state_dict(state["starts"])
        self._wants_teacher, self._wants_student, self._finished = (list(queue) for queue in state["queues"])
        self.counters = RolloutCounters(**state["counters"])
        if state["slots"] is None:
            self._pool = None
            return
        slots = [Slot.from_state(slot) for slot in state["slots"]]
        self._pool = Pool(
            state=state["tensors"]["state"].to(self._device),
            solver=state["tensors"]["solver"].to(self._device),
            guidance_scale=self._scales(slots),
            conditioning=self._encoder.encode([slot.prompt for slot in slots]),
            slots=slots,
        )

    def _take(self, queue: list[int], size: int) -> list[int]:
        """Remove the `size` slots that have waited longest."""
        rows = queue[:size]
        del queue[:size]
        self.counters.rows += len(rows)
        self.counters.places += size
        return rows

    def _teacher_tick(self, pool: Pool, rows: list[int]) -> None:
        slots = [pool.slots[row] for row in rows]
        index = self._ints(rows)
        step_index = self._ints([slot.step_index for slot in slots])
        substep = self._ints([slot.substep for slot in slots])
        pool.solver[index] = self._timed(
            lambda: self._teacher.substep(
                pool.solver[index], step_index, substep, pool.conditioning.select(index), pool.guidance_scale[index]
            )
        )
        self.counters.teacher_calls += 1
        for slot in slots:
            slot.substep += 1
        answered = [slot.substep == self._grid.substeps for slot in slots]
        self._wants_teacher += [row for row, done in zip(rows, answered, strict=True) if not done]
        self._depart(pool, [row for row, done in zip(rows, answered, strict=True) if done])

    def _student_tick(self, pool: Pool, rows: list[int]) -> None:
        slots = [pool.slots[row] for row in rows]
        index = self._ints(rows)
        step_index = self._ints([slot.step_index for slot in slots])
        next_index = self._ints([slot.next_index for slot in slots])
        noise = None
        if self._student.uses_noise:
            noise = draw_noise([slot.generator for slot in slots], pool.state.shape[1:], self._device)
        latents = self._timed(
            lambda: self._student.step(
                pool.state[index],
                step_index,
                pool.conditioning.select(index),
                pool.guidance_scale[index],
                next_index=next_index,
                noise=noise,
            )
        )
        self.counters.student_calls += 1
        for slot in slots:
            slot.policy_version = self._version
        self._advance(pool, rows, latents, StateSource.STUDENT)

    def _depart(self, pool: Pool, rows: Sequence[int]) -> None:
        """The expert has answered at these slots' states: record them labelled, and go on as the draw said."""
        due = [row for row in rows if self._settings.labels and pool.slots[row].recorded]
        self._record(pool, due, labelled=True)
        advancing = []
        for row in rows:
            slot = pool.slots[row]
            if slot.at_end:
                self._finished.append(row)
            elif slot.student_next:
                self._wants_student.append(row)
            else:
                advancing.append(row)
        self._advance(pool, advancing, pool.solver[advancing], StateSource.TEACHER)

    def _advance(self, pool: Pool, rows: Sequence[int], latents: Tensor, source: StateSource) -> None:
        """Put slots at their next stop, at `latents` [len(rows), C, H, W], made by `source`."""
        if not rows:
            return
        pool.state[self._ints(rows)] = latents
        for row in rows:
            pool.slots[row].source = source
            pool.slots[row].stop += 1
        self._arrive(pool, rows)

    def _arrive(self, pool: Pool, rows: Sequence[int]) -> None:
        """Slots stand at a stop: draw who acts next, and queue them. Without labels the state is due now."""
        labels = self._settings.labels
        asking, due = [], []
        for row in rows:
            slot = pool.slots[row]
            slot.student_next = self._mode.student_acts(slot.draws, self._student_probability)
            if slot.recorded and not labels:
                due.append(row)
            if (slot.recorded and labels) or not (slot.at_end or slot.student_next):
                slot.substep = 0
                asking.append(row)
            elif slot.at_end:
                self._finished.append(row)
            else:
                self._wants_student.append(row)
        index = self._ints(asking)
        pool.solver[index] = pool.state[index]
        self._wants_teacher += asking
        self._record(pool, due, labelled=False)

    def _restart_finished(self, pool: Pool) -> None:
        rows, self._finished = self._finished, []
        if not rows:
            return
        self.counters.trajectories += len(rows)
        slots, x_t = self._starts.next(len(rows))
        index = self._ints(rows)
        pool.state[index] = x_t
        pool.guidance_scale[index] = self._scales(slots)
        pool.conditioning.assign(index, self._encoder.encode([slot.prompt for slot in slots]))
        for row, slot in zip(rows, slots, strict=True):
            pool.slots[row] = slot
        self._arrive(pool, rows)

    def _new_pool(self) -> Pool:
        slots, x_t = self._starts.next(self._settings.batch_size + self._settings.student_batch_size)
        return Pool(
            state=x_t,
            solver=x_t.clone(),
            guidance_scale=self._scales(slots),
            conditioning=self._encoder.encode([slot.prompt for slot in slots]),
            slots=slots,
        )

    def _record(self, pool: Pool, rows: Sequence[int], *, labelled: bool) -> None:
        """Keep the states that these slots stand at, with the expert's answers if `labelled`, for who called `tick`."""
        if not rows:
            return
        index = self._ints(rows)
        slots = [pool.slots[row] for row in rows]
        versions = (slot.policy_version for slot in slots)
        columns: dict[str, Any] = {
            "source": [slot.source for slot in slots],
            "timestep": [self._grid.student[slot.step_index] for slot in slots],
            "policy_version": [NO_POLICY if version is None else version for version in versions],
            "step_index": [slot.step_index for slot in slots],
            "trajectory_id": [slot.trajectory_id for slot in slots],
            "guidance_scale": [slot.guidance_scale for slot in slots],
            "prompt": [slot.prompt for slot in slots],
        }
        dtype = self._settings.latent_dtype
        label = at_rest(pool.solver[index], dtype) if labelled else None
        self._made.append(States.of(columns, x_t=at_rest(pool.state[index], dtype), label=label))

    def _timed(self, call: Callable[[], Tensor]) -> Tensor:
        """The call's answer; its time counts as the networks'. A GPU's counts once it is known; none is waited for."""
        if self._device.type != "cuda":
            begun = time.perf_counter()
            answer = call()
            self.counters.network_s += time.perf_counter() - begun
            return answer
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        answer = call()
        end.record()
        self._on_device.append((begin, end))
        while self._on_device and self._on_device[0][1].query():
            first, last = self._on_device.popleft()
            self.counters.network_s += first.elapsed_time(last) / 1000
        return answer

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _scales(self, slots: Sequence[Slot]) -> Tensor:
        return torch.tensor([slot.guidance_scale for slot in slots], dtype=torch.float32, device=self._device)
