"""The same states made otherwise: a batch in lockstep, and stock pipelines in a loop."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from ddil_dist.problem import ImitationProblem
from ddil_dist.replay.codec import Rows
from ddil_dist.sampling import draw_noise, seeded
from ddil_dist.states import States, at_rest
from ddil_dist.types import StateSource
from tests.benchmarks.engine.scene import CPU, EngineRun, cpu_s

GUIDANCE_SCALE = 4.0
"""Of the stock loops, whose batches have one."""
PROBABILITIES = (0.0, 0.2, 0.5, 0.8, 1.0)


class Lockstep:
    """A whole batch moves from grid point to grid point together; at each, both policies, and a mask.

    masked: each policy runs on the whole batch, as static shapes need, unless no row at all wants it; otherwise on the
    rows that want it.
    """

    def __init__(self, problem: ImitationProblem, batch_size: int, *, masked: bool) -> None:
        self._problem = problem
        self._batch_size = batch_size
        self._masked = masked
        self._teacher = problem.teacher_policy()
        self._student = problem.student_policy(problem.new_student().eval())
        self._prompts = problem.prompts()
        self._batches = 0

    @torch.no_grad()
    def states_per_s(self, probability: float) -> float:
        """Of one batch of trajectories, from noise to the last grid point."""
        num, grid = self._batch_size, self._problem.grid
        generator = torch.Generator().manual_seed(self._batches)
        self._batches += 1
        begun = cpu_s()
        prompts = [self._prompts[int(i)] for i in torch.randint(len(self._prompts), (num,), generator=generator)]
        seeds = [num * self._batches + row for row in range(num)]
        x = draw_noise(seeded(seeds), self._problem.teacher.latent_shape, CPU)
        told = self._problem.encoder.encode(prompts)
        scales = 1 + 7 * torch.rand(num, generator=generator)
        states: list[States[Any]] = []
        for index in range(grid.num_steps):
            at = torch.full((num,), index)
            student = torch.rand(num, generator=generator) < probability
            columns: dict[str, Any] = {
                "source": [StateSource.STUDENT if acts else StateSource.TEACHER for acts in student.tolist()],
                "timestep": [grid.student[index]] * num,
                "policy_version": [0] * num,
                "step_index": [index] * num,
                "trajectory_id": seeds,
                "guidance_scale": scales.tolist(),
                "prompt": prompts,
            }
            states.append(States.of(columns, x_t=at_rest(x)))
            if index < grid.num_steps - 1:
                moved = x.clone()
                for move, rows in ((self._student.step, student), (self._teacher.solve, ~student)):
                    if self._masked and bool(rows.any()):
                        moved[rows] = move(x, at, told, scales)[rows]
                    elif bool(rows.any()):
                        which = rows.nonzero().flatten()
                        moved[which] = move(x[which], at[which], told.select(which), scales[which])
                x = moved
        return sum(map(len, states)) / (cpu_s() - begun)


class StockLoop:
    """Stock pipelines, one call a batch of prompts, latents at the student's grid points kept by the step callback.

    A stock pipeline cannot change its policy on the way, and gives a batch one guidance scale: each trajectory is the
    teacher's or the student's, so the mixture at a probability is that of two loops. It is interrupted at the last
    grid point, where the engine stops too.
    """

    def __init__(self, problem: ImitationProblem, batch_size: int) -> None:
        self._problem = problem
        self._prompts = problem.prompts()[:batch_size]
        stock = problem.teacher.pipeline
        scheduler = problem.student_scheduler()  # of as many steps as it is asked for, the teacher's too
        unets = {True: problem.new_student().eval(), False: stock.unet}
        self._pipelines = {}
        for student, unet in unets.items():
            components = {**stock.components, "unet": unet, "scheduler": scheduler}
            self._pipelines[student] = StableDiffusionPipeline(**components, requires_safety_checker=False)
            self._pipelines[student].set_progress_bar_config(disable=True)

    def seconds_per_state(self, *, student: bool) -> float:
        begun = cpu_s()
        kept = self.roll(student=student)
        return (cpu_s() - begun) / (len(self._prompts) * (len(kept) + 1))  # the starting noise is a state too

    def roll(self, *, student: bool) -> list[Rows]:
        """The batch's latents at the grid points past the first."""
        grid = self._problem.grid
        pipeline, substeps = self._pipelines[student], 1 if student else grid.substeps
        kept: list[Rows] = []

        def keep(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
            if (step + 1) % substeps == 0 and len(kept) < grid.num_steps - 1:
                kept.append(at_rest(values["latents"]))
                pipe._interrupt = len(kept) == grid.num_steps - 1
            return values

        pipeline(
            self._prompts,
            latents=draw_noise(seeded(range(len(self._prompts))), self._problem.teacher.latent_shape, CPU),
            num_inference_steps=grid.num_steps * substeps,
            guidance_scale=GUIDANCE_SCALE,
            output_type="latent",
            callback_on_step_end=keep,
        )
        return kept


def run(batch_size: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds; in a round every contender takes its turn at every probability."""
    bare = EngineRun(batch_size, "rollout.labels=learner")
    contenders = {
        "lockstep, masked": Lockstep(bare.problem, batch_size, masked=True),
        "lockstep, by rows": Lockstep(bare.problem, batch_size, masked=False),
    }
    loops = {"stock pipelines, batched": StockLoop(bare.problem, batch_size)}
    loops["stock pipelines, one by one"] = StockLoop(bare.problem, 1)
    speeds: dict[str, dict[float, list[float]]] = {}

    def note(name: str, probability: float, speed: float) -> None:
        speeds.setdefault(name, {}).setdefault(probability, []).append(speed)

    for _ in range(rounds):
        for probability in PROBABILITIES:
            note("engine", probability, bare.turn(probability).states_per_s)
            for name, contender in contenders.items():
                note(name, probability, contender.states_per_s(probability))
        for name, loop in loops.items():
            student, teacher = loop.seconds_per_state(student=True), loop.seconds_per_state(student=False)
            for probability in PROBABILITIES:
                note(name, probability, 1 / (probability * student + (1 - probability) * teacher))
    return {
        name: {probability: statistics.median(found) for probability, found in by.items()}
        for name, by in speeds.items()
    }


def shares(batch_size: int) -> dict[str, Any]:
    """Batch fill and the networks' share of a tick, with labels (and half of the states forward ones) and without."""
    found: dict[str, Any] = {}
    for labels in ("learner", "actors"):
        engine = EngineRun(batch_size, f"rollout.labels={labels}")
        for probability in PROBABILITIES:
            turn = engine.turn(probability, forward_share=0.5)
            found[f"{labels}, {probability:g}"] = {
                "fill": turn.fill,
                "network_s / tick_s": turn.policy_share,
                "U-Net alone": turn.network_share,
                "states per CPU second": turn.states_per_s,
            }
    return found
