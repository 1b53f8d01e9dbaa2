"""One problem with a student that differs from its teacher, engines over it, and what they rolled out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from actors.engine import RolloutEngine, RolloutSettings
from actors.starts import Record
from ddil_dist.config import NoThresholding
from ddil_dist.methods.rollouts import RolloutMode
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.policy import StudentPolicy, TeacherPolicy
from ddil_dist.problem import ImitationProblem
from tests.support.cheap import CheapUNet
from tests.support.problem import CPU
from tests.support.states import Row, rows

PROMPTS = ["a red square", "a blue circle", "ein grünes Dreieck", "", "two cats"]
GUIDANCE = (2.0, 5.0)
BATCH = 4
STUDENT_BATCH = 2


class Scene:
    """Networks that cost nothing unless others are given."""

    def __init__(
        self,
        problem: ImitationProblem,
        *,
        kind: type[StudentPolicy] = StudentPolicy,
        mode: RolloutMode | None = None,
        record: Record = "all",
    ) -> None:
        self.problem = problem
        self.mode = mode
        self.record: Record = record
        schedule, null = problem.teacher.schedule, problem.encoder.encode([""])
        teacher = Denoiser(CheapUNet(guided=False), schedule, "epsilon")
        self.teacher = TeacherPolicy(teacher, null, NoThresholding().threshold(), problem.grid)
        network = problem.student_denoiser(CheapUNet(guided=True, bias=0.05))
        self.student = kind(network, problem.grid, CPU)

    def engine(
        self,
        *,
        labels: bool,
        forward: bool = False,
        seed: int = 5,
        batch_size: int = BATCH,
        student_batch_size: int = STUDENT_BATCH,
    ) -> RolloutEngine:
        return RolloutEngine(
            teacher=self.teacher,
            student=self.student,
            schedule=self.problem.teacher.schedule,
            encoder=self.problem.encoder,
            prompts=PROMPTS,
            forward=self.problem.forward_data(seed=seed) if forward else None,
            latent_shape=self.problem.teacher.latent_shape,
            device=CPU,
            settings=RolloutSettings(
                batch_size=batch_size,
                student_batch_size=student_batch_size,
                labels=labels,
                guidance=GUIDANCE,
                seed=seed,
                mode=self.mode,
                record=self.record,
            ),
        )

    @torch.no_grad()
    def move(self, x: Tensor, index: int, prompt: str, scale: float, *, student: bool) -> Tensor:
        """One transition of one row."""
        policy = self.student.step if student else self.teacher.solve
        arguments = (torch.tensor([index]), self.problem.encoder.encode([prompt]), torch.tensor([scale]))
        moved: Tensor = policy(x.unsqueeze(0), *arguments)[0]
        return moved


def run(engine: RolloutEngine, ticks: int) -> list[Row]:
    return rows(*(states for _ in range(ticks) for states in engine.tick()))


def trajectories(states: Sequence[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = defaultdict(list)
    for state in states:
        found[state.trajectory_id].append(state)
    return {key: sorted(group, key=lambda state: state.step_index) for key, group in found.items()}


def answers(scene: Scene, states: Sequence[Row]) -> Tensor:
    """What the expert says at these states, [B, C, H, W]."""
    return scene.teacher.solve(
        torch.stack([state.x_t for state in states]),
        torch.tensor([state.step_index for state in states]),
        scene.problem.encoder.encode([state.prompt for state in states]),
        torch.tensor([state.guidance_scale for state in states]),
    )
