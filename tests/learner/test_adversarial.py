"""LADD and UFOGen by hand: hinge, gradient penalty, distances, and what the discriminators are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ddil_dist.methods import DISCRIMINATOR
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.problem import ImitationProblem
from learner.methods.critic import first_half
from learner.methods.ladd import LaddObjective, TeacherHeads
from learner.methods.ufogen import UfogenObjective
from tests.methods.contract import batch_of, started
from tests.support.problem import draw_states, tiny_problem

FORWARD = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
COMMON = ("rollout.labels=learner", "student.spacing=trailing", FORWARD)


def ladd(directory: Path, *overrides: str) -> tuple[ImitationProblem, LaddObjective]:
    problem = tiny_problem(directory, "objective.type=ladd", *COMMON, *overrides)
    objective, _ = started(problem)
    assert isinstance(objective, LaddObjective)
    return problem, objective


def test_the_penalty_is_the_squared_gradient_of_each_head_by_its_features(tiny_directory: Path) -> None:
    problem = tiny_problem(tiny_directory, "objective.type=ladd", *COMMON)
    torch.manual_seed(0)
    heads = TeacherHeads(problem.teacher.unet)
    x_t, _, conditioning, _ = draw_states(problem, 3)
    t = torch.tensor([7, 500, 990])
    told = (x_t, t, conditioning.embeddings)
    (found,) = heads(*told, penalise=True, return_dict=False)
    features, time = first_half(problem.teacher.unet, *told)
    by_hand = torch.zeros(3)
    for head, part in zip(heads.heads, features, strict=True):
        for row in range(3):
            one = part[row : row + 1].detach().requires_grad_()
            answer = head(one, time[row : row + 1], conditioning.embeddings[row : row + 1].mean(1))
            (gradient,) = torch.autograd.grad(answer.sum(), one)
            by_hand[row] += gradient.square().sum() / len(features)
    torch.testing.assert_close(found[:, -1], by_hand, rtol=1e-4, atol=1e-7)
    (without,) = heads(*told, return_dict=False)
    torch.testing.assert_close(found[:, :-1], without)
    found[:, -1].sum().backward()
    assert all(parameter.grad is not None for head in heads.heads for parameter in head.features.parameters())


@pytest.mark.parametrize(("scale", "sigma"), [("alpha", False), ("score_distillation", True)])
def test_ladd_s_losses_by_hand(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch, scale: str, sigma: bool) -> None:
    problem, objective = ladd(
        tiny_directory, f"objective.distillation_scale={scale}", "objective.r1_weight=0.5", "teacher.guidance.max=1"
    )
    shown: list[Tensor] = []

    def answers(x: Tensor, conditioning: Conditioning, guidance_scale: Tensor, *, penalise: bool = False) -> Tensor:
        shown.append(x.detach())
        mean = x.mean((1, 2, 3))
        found = torch.stack([mean, 3 * mean], 1)
        return torch.cat([found, torch.full((len(x), 1), 0.4)], 1) if penalise else found

    monkeypatch.setattr(objective, "_answers", answers)
    monkeypatch.setattr("learner.methods.ladd.uniform_timesteps", lambda num, *_: torch.full((num,), 300))
    monkeypatch.setattr(objective._teacher, "predict_x_0", lambda x_t, *_: torch.full_like(x_t, 0.5))
    generator, discriminator = objective.phases(3)
    batch = batch_of(problem, 4)
    output = generator.loss(batch)
    (x,) = shown
    schedule, t = problem.teacher.schedule, torch.tensor([300])
    c = float(schedule.alpha(t)) * (float(schedule.sigma(t)) if sigma else 1)
    expected = -2 * x.mean((1, 2, 3)) + 2.5 * c * (x - 0.5).square().mean((1, 2, 3))
    torch.testing.assert_close(output.per_sample, expected, rtol=1e-4, atol=1e-5)
    output = discriminator.loss(batch)
    fake, real = shown[1:]
    assert torch.equal(fake, x), "the discriminator is shown what the generator has just made"
    hinge = sum(((1 + k * fake.mean((1, 2, 3))).relu() + (1 - k * real.mean((1, 2, 3))).relu()) / 2 for k in (1, 3))
    torch.testing.assert_close(output.per_sample, hinge + 0.5 * 0.4, rtol=1e-4, atol=1e-5)
    problem_data = problem.forward_data(seed=1_000_003)
    problem_data.load_state_dict({"position": 3 * problem.config.learner.worker_batch_size})
    torch.testing.assert_close(real, problem_data.next(4)[0])


def test_ufogen_s_losses_by_hand(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny_problem(tiny_directory, "objective.type=ufogen", *COMMON, "objective.reconstruction_weight=3")
    objective, networks = started(problem)
    assert isinstance(objective, UfogenObjective)
    assert sum(p.numel() for p in networks[DISCRIMINATOR].parameters()) < sum(
        p.numel() for p in networks["student"].parameters()
    ), "of the network's second half nothing is kept"
    asked: list[tuple[Tensor, Tensor]] = []

    class Mean:
        def predict(self, x: Tensor, t: Tensor, *_: Any) -> Tensor:
            asked.append((x.detach(), t))
            return x.mean((1, 2, 3)).unsqueeze(1)

    monkeypatch.setattr(objective, "_discriminator", Mean())
    monkeypatch.setattr("learner.methods.ufogen.noised", lambda x, t, schedule: (x + t.view(-1, 1, 1, 1) / 1e3, 0 * x))
    generator, discriminator = objective.phases(0)
    batch = batch_of(problem, 4)
    output = generator.loss(batch)
    grid = torch.tensor([*problem.grid.student, -1])
    s = grid[batch.step_index + 1]
    made = objective._made[0]
    assert asked[0][1].tolist() == s.clamp(min=0).tolist()
    torch.testing.assert_close(asked[0][0], made.x + s.view(-1, 1, 1, 1) / 1e3)
    fake, real = (x.mean((1, 2, 3)) + s / 1e3 for x in (made.x, made.x_0))
    expected = softplus(-fake) + 3 * (made.x - made.x_0).square().mean((1, 2, 3))
    torch.testing.assert_close(output.per_sample, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(discriminator.loss(batch).per_sample, softplus(fake) + softplus(-real))
    torch.testing.assert_close(made.x_0, problem.forward_data(seed=1_000_003).next(4)[0])
    assert not objective._made
