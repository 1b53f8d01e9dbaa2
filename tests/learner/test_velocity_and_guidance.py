"""Velocity conversion and guidance conditioning: their target is the guided teacher's own answer at x_t."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddil_dist.models.denoiser import Denoiser
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods import Objective, create_objective
from learner.methods.progressive import ProgressiveObjective
from learner.methods.velocity import VelocityObjective
from tests.support.problem import draw_states, perturbed, tiny_problem
from tests.support.states import train_batch

WHOLE = ("student.steps=8", "teacher.steps=8")


def batch_of(problem: ImitationProblem, scales: Tensor) -> States[torch.Tensor]:
    x_t, index, conditioning, _ = draw_states(problem, len(scales))
    whole = torch.zeros(len(scales), dtype=torch.int64)
    label = problem.teacher_policy().solve(x_t, index, conditioning, scales)
    return train_batch(x_t, index, conditioning, scales, label, whole.to(torch.uint8), whole - 1, whole)


def teachers_eps(problem: ImitationProblem, batch: States[torch.Tensor]) -> Tensor:
    """Classifier-free guidance by its definition, on the pipeline's own network."""
    t = torch.tensor(problem.grid.student)[batch.step_index]
    null = problem.encoder.encode([""]).embeddings.expand_as(batch.conditioning.embeddings)
    with torch.no_grad():
        conditional = problem.teacher.unet(batch.x_t, t, batch.conditioning.embeddings).sample
        unconditional = problem.teacher.unet(batch.x_t, t, null).sample
    return unconditional + batch.guidance_scale.view(-1, 1, 1, 1) * (conditional - unconditional)


@pytest.fixture(scope="module")
def problem(tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory, *WHOLE, "objective.type=velocity")


def test_velocity_is_matched_to_that_of_the_guided_teacher(problem: ImitationProblem) -> None:
    batch = batch_of(problem, torch.linspace(1, 9, 8))
    t = torch.tensor(problem.grid.student)[batch.step_index]
    schedule = problem.teacher.schedule
    alpha, sigma, eps = schedule.alpha(t), schedule.sigma(t), teachers_eps(problem, batch)
    velocity = alpha * eps - sigma * (batch.x_t - sigma * eps) / alpha
    network = perturbed(problem.new_student())
    with torch.no_grad():
        told = Denoiser(network, schedule, "v_prediction").predict(
            batch.x_t, t, batch.conditioning, batch.guidance_scale
        )
        output = VelocityObjective(Denoiser(network, schedule, "v_prediction"), problem.grid).loss(batch)
    torch.testing.assert_close(output.per_sample, (told - velocity).square().mean((1, 2, 3)), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["velocity", "guidance"])
def test_the_unguided_teacher_has_no_loss_at_scale_one(tiny_directory: Path, kind: str) -> None:
    problem = tiny_problem(tiny_directory, *WHOLE, f"objective.type={kind}")
    network = problem.new_student()
    objective: Objective = create_objective(problem.config, problem, {"student": network})
    if kind == "velocity":  # of a network that still says eps, as the teacher does: converted by algebra
        objective = VelocityObjective(problem.teacher_denoiser(network), problem.grid)
    (phase,) = objective.phases(0)
    with torch.no_grad():
        unguided = phase.loss(batch_of(problem, torch.ones(8))).per_sample
        guided = phase.loss(batch_of(problem, torch.full((8,), 6.0))).per_sample
    # At t = 999 a float's rounding of x_0 is amplified by 1 / alpha.
    assert float(unguided.max()) < 1e-4
    assert (guided > 10 * unguided).all()


@pytest.mark.parametrize(("weighting", "power"), [("truncated_snr", None), ("snr", 1)])
def test_guidance_is_matched_at_the_same_state(tiny_directory: Path, weighting: str, power: int | None) -> None:
    problem = tiny_problem(tiny_directory, *WHOLE, "objective.type=guidance", f"objective.weighting={weighting}")
    batch = batch_of(problem, torch.linspace(2, 9, 8))
    network = perturbed(problem.new_student())
    objective = create_objective(problem.config, problem, {"student": network})
    assert isinstance(objective, ProgressiveObjective)
    t = torch.tensor(problem.grid.student)[batch.step_index]
    with torch.no_grad():
        told = problem.student_denoiser(network).predict(batch.x_t, t, batch.conditioning, batch.guidance_scale)
        loss = objective.loss(batch).per_sample
    error = (told - teachers_eps(problem, batch)).square()  # SNR |x_0 error|^2 is |eps error|^2
    if power is None:
        error = error / problem.teacher.schedule.snr(t).clamp(max=1)
    torch.testing.assert_close(loss, error.mean((1, 2, 3)), rtol=2e-3, atol=1e-5)


def test_gradients_reach_the_student_alone(problem: ImitationProblem) -> None:
    student = perturbed(problem.new_student())
    VelocityObjective(problem.student_denoiser(student), problem.grid).loss(
        batch_of(problem, torch.full((4,), 3.0))
    ).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in problem.teacher.unet.parameters())


def test_fewer_steps_than_the_teachers_are_our_own_bug(tiny_directory: Path, problem: ImitationProblem) -> None:
    coarse = tiny_problem(tiny_directory)
    with pytest.raises(AssertionError, match="keeps the teacher's steps"):
        VelocityObjective(coarse.student_denoiser(coarse.new_student()), coarse.grid)
    batch = replace(batch_of(problem, torch.ones(2)), label=None)
    with pytest.raises(AssertionError, match="needs the expert's answers"):
        VelocityObjective(problem.student_denoiser(problem.new_student()), problem.grid).loss(batch)
