"""Consistency distillation's loss against Gaussian closed forms, definitions in float64, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddil_dist.diffusion.consistency import BoundaryCondition
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.thresholding import reflect
from ddil_dist.methods import Consistency
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.states import States
from learner.methods import create_objective
from learner.methods.consistency import TARGET, ConsistencyObjective, pseudo_huber
from tests.learner.gaussian import GaussianNetwork
from tests.learner.support import SCHEDULE, make_batch, new_network, weights_of
from tests.support.problem import draw_states, perturbed, tiny_problem
from tests.support.states import train_batch

GRID = TrajectoryGrid.create(50, 50, spacing="trailing")
POINTS = torch.tensor([*GRID.student, -1])


def identity(x_0: Tensor) -> Tensor:
    return x_0


def solver_batch(num: int = 8, *, seed: int = 0) -> States[torch.Tensor]:
    """States all over the solver's grid, both its ends among them."""
    batch = make_batch(np.random.default_rng(seed), num)
    return replace(batch, step_index=torch.linspace(0, 49, num).long())


def objective_of(
    network: nn.Module, *, threshold: Callable[[Tensor], Tensor] = identity, kind: Any = "v_prediction", **settings: Any
) -> ConsistencyObjective:
    return ConsistencyObjective(Denoiser(network, SCHEDULE, kind), GRID, Consistency(**settings), threshold)


class ExactConsistency(nn.Module):
    """Says the x_0 ("sample") for which c_skip x_t + c_out x_0 is the exact consistency function, plus `offset`."""

    def __init__(self, data: GaussianNetwork, *, offset: float = 0.0) -> None:
        super().__init__()
        self.config = {"time_cond_proj_dim": None}
        self.data = data
        self.offset = nn.Parameter(torch.tensor(offset))

    def forward(self, x: Tensor, t: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        c_skip, c_out = BoundaryCondition().scalings(t)
        return ((self.data.origin(x, t) - c_skip * x) / c_out.clamp(min=1e-3) + self.offset,)


@pytest.mark.parametrize("target", ["average", "online"])
def test_the_exact_consistency_function_of_a_gaussian_has_no_loss(target: str) -> None:
    data = GaussianNetwork(SCHEDULE, 0.7, 0.4)
    batch = solver_batch(26)
    t, s = POINTS[batch.step_index], POINTS[batch.step_index + 1]
    batch = replace(batch, label=data.flow(batch.x_t, t, s))
    exact = objective_of(ExactConsistency(data), kind="sample", target=target).loss(batch)
    assert float(exact.per_sample.max()) < 1e-5
    # A constant error of f on one side is |error| of the loss, as c is small.
    moved = ExactConsistency(data)
    objective = objective_of(moved, kind="sample", target="average")
    with torch.no_grad():
        moved.offset.add_(0.25)
    np.testing.assert_allclose(objective.loss(batch).per_sample.numpy(), 0.25, atol=2e-3)


def by_hand(batch: States[torch.Tensor], student: nn.Module, target: nn.Module, *, limit: float | None = None) -> Any:
    """f(x_t) - f'(x_s) [B, C, H, W] in float64, for networks that say v. Constants as in Luo et al. 2023."""
    assert batch.label is not None

    def consistent(network: nn.Module, x: Tensor, time: Tensor, limit: float | None) -> Any:
        asked = time.clamp(min=0)
        with torch.no_grad():
            v = Denoiser(network, SCHEDULE, "v_prediction").predict(x, asked, batch.conditioning, batch.guidance_scale)
        alpha, sigma = SCHEDULE.alpha(time).double().numpy(), SCHEDULE.sigma(time).double().numpy()
        x_0 = alpha * x.double().numpy() - sigma * v.double().numpy()
        if limit is not None:
            x_0 = reflect(torch.from_numpy(x_0), limit=torch.tensor(limit)).numpy()
        scaled = 10.0 * asked.double().view(-1, 1, 1, 1).numpy()
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        return c_skip * x.double().numpy() + c_out * x_0

    t, s = POINTS[batch.step_index], POINTS[batch.step_index + 1]
    return consistent(student, batch.x_t, t, None) - consistent(target, batch.label, s, limit)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_loss_is_the_pseudo_huber_distance_to_the_average(limit: float | None) -> None:
    batch = solver_batch()
    student, before = new_network(), new_network()

    def threshold(x_0: Tensor) -> Tensor:
        return x_0 if limit is None else reflect(x_0, limit=torch.tensor(limit))

    objective = objective_of(student, threshold=threshold)
    with torch.no_grad():
        student.gain.add_(0.3)
    difference = by_hand(batch, student, before, limit=limit)
    assert np.abs(difference).max() > 0.1
    loss = (np.sqrt(difference**2 + 1e-6) - 0.001).mean((1, 2, 3))
    output = objective.loss(batch)
    np.testing.assert_allclose(output.per_sample.numpy(), loss, rtol=1e-4, atol=1e-6)
    assert output.loss.item() == pytest.approx(loss.mean(), rel=1e-4)


def test_the_target_of_lcm_lora_is_the_student_of_now() -> None:
    batch, student = solver_batch(), new_network()
    objective = objective_of(student, target="online")
    assert objective.state == {}
    with torch.no_grad():
        student.gain.add_(0.3)
    difference = by_hand(batch, student, student)
    np.testing.assert_allclose(
        objective.loss(batch).per_sample.numpy(),
        (np.sqrt(difference**2 + 1e-6) - 0.001).mean((1, 2, 3)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_pseudo_huber_of_an_element_and_of_a_whole_sample() -> None:
    difference = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).view(2, 2, 1, 1)
    whole = pseudo_huber(difference, c=12.0, whole=True)
    assert whole.tolist() == pytest.approx([13 - 12, 0])  # 5, 12, 13
    element = pseudo_huber(difference, c=4.0, whole=False)
    assert element.tolist() == pytest.approx([(5 - 4 + np.sqrt(32) - 4) / 2, 0])


def test_the_average_moves_by_its_decay_and_is_checkpointed() -> None:
    student = new_network()
    objective = objective_of(student)
    average = objective.state[TARGET]
    start = student.gain.item()
    with torch.no_grad():
        student.gain.add_(1.0)
    for update in range(2):
        objective.after_update(update)
    assert weights_of(average)["gain"] == pytest.approx(start + 1 - 0.95**2)
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_the_gradient_is_that_of_finite_differences_with_the_target_held() -> None:
    # Far from the target the loss is nearly |d|, which is piecewise linear in `bias`.
    batch = solver_batch(4)
    student = new_network()
    objective = objective_of(student, huber_c=1.0)
    output = objective.loss(batch)
    output.loss.backward()
    gradient = student.bias.grad
    assert gradient is not None
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            student.bias.add_(sign * 0.01)
            values.append(float(objective.loss(batch).loss))
    assert gradient.item() == pytest.approx((values[0] - values[1]) / 0.02, rel=2e-2)


def test_the_gradient_reaches_the_student_alone(tiny_directory: Path) -> None:
    problem = tiny_problem(
        tiny_directory,
        "objective.type=consistency",
        "prior.parts=[{until: 1, forward: 0.5, student: 0.5, teacher: 0}]",
        "thresholding={type: reflect, limit: 2}",
    )
    assert problem.grid.student[:2] + problem.grid.student[-1:] == (999, 979, 19)
    x_t, index, conditioning, scales = draw_states(problem, 4)
    label = problem.teacher_policy().solve(x_t, index, conditioning, scales)
    whole = torch.zeros(4, dtype=torch.int64)
    batch = train_batch(x_t, index, conditioning, scales, label, whole.to(torch.uint8), whole - 1, whole)
    student = perturbed(problem.new_student())
    objective = create_objective(problem.config, problem, {"student": student})
    (phase,) = objective.phases(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
    phase.loss(batch).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in student.parameters())
    frozen = (problem.teacher.unet, objective.state[TARGET])
    assert all(parameter.grad is None for network in frozen for parameter in network.parameters())
