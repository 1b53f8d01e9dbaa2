"""Progressive distillation's loss against closed forms, exact students and finite differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ddil_dist.diffusion.parameterization import PredictionType
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods.progressive import ProgressiveObjective, Weighting, snr_weight
from tests.learner.support import GRID, SCHEDULE, make_batch, new_network
from tests.support.problem import draw_states, perturbed, tiny_problem
from tests.support.states import train_batch

WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


def batch_at(problem: ImitationProblem, *, scale: float) -> States[torch.Tensor]:
    """States with the teacher's answers under one guidance scale."""
    x_t, index, conditioning, _ = draw_states(problem, 8)
    scales = torch.full((8,), scale)
    whole = torch.zeros(8, dtype=torch.int64)
    label = problem.teacher_policy().solve(x_t, index, conditioning, scales)
    return train_batch(x_t, index, conditioning, scales, label, whole.to(torch.uint8), whole - 1, whole)


@pytest.fixture(scope="module")
def problem(tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_student_that_steps_as_its_teacher_has_no_loss(tiny_directory: Path, weighting: Weighting) -> None:
    # With one teacher step a student step, and no guidance, the new student is exact.
    problem = tiny_problem(tiny_directory, "teacher.steps=4")
    batch = batch_at(problem, scale=1.0)
    exact, moved = problem.new_student(), perturbed(problem.new_student())
    losses = {}
    for name, network in (("exact", exact), ("moved", moved)):
        objective = ProgressiveObjective(problem.student_denoiser(network), problem.grid, weighting)
        with torch.no_grad():
            losses[name] = float(objective.loss(batch).loss)
    assert losses["exact"] < 1e-6
    assert losses["moved"] > 1e3 * losses["exact"]


def test_a_new_student_is_wrong_where_the_teacher_takes_more_steps_or_is_guided(problem: ImitationProblem) -> None:
    objective = ProgressiveObjective(problem.student_denoiser(problem.new_student()), problem.grid, "truncated_snr")
    with torch.no_grad():
        unguided = objective.loss(batch_at(problem, scale=1.0)).per_sample
        guided = objective.loss(batch_at(problem, scale=6.0)).per_sample
    assert (unguided > 1e-8).all()
    assert guided.mean() > unguided.mean()


def predictions(batch: States[torch.Tensor], kind: PredictionType) -> dict[str, np.ndarray]:
    """x_0, eps and v of the student and of the transition that the label implies, in float64 by their definitions."""
    network = new_network()
    t = torch.tensor(GRID.student)[batch.step_index]
    s = torch.tensor([row[-1] for row in GRID.teacher])[batch.step_index]
    with torch.no_grad():
        output = Denoiser(network, SCHEDULE, kind).predict(batch.x_t, t, batch.conditioning, batch.guidance_scale)
    a_t, s_t, a_s, s_s = (
        value.double().numpy() for value in (SCHEDULE.alpha(t), SCHEDULE.sigma(t), SCHEDULE.alpha(s), SCHEDULE.sigma(s))
    )
    assert batch.label is not None
    x, label, out = (value.double().numpy() for value in (batch.x_t, batch.label, output))
    x_0 = (x - s_t * out) / a_t if kind == "epsilon" else a_t * x - s_t * out
    # label = a_s x~ + s_s (x - a_t x~) / s_t, solved for x~.
    target = (label * s_t - s_s * x) / (a_s * s_t - s_s * a_t)
    eps, eps_target = (x - a_t * x_0) / s_t, (x - a_t * target) / s_t
    return {
        "x_0": x_0 - target,
        "eps": eps - eps_target,
        "v": (a_t * eps - s_t * x_0) - (a_t * eps_target - s_t * target),
        "snr": (a_t / s_t) ** 2,
    }


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings_are_the_losses_that_they_stand_for(weighting: Weighting, kind: PredictionType) -> None:
    batch = make_batch(np.random.default_rng(0), 8)
    error = predictions(batch, kind)
    by_hand = {
        "snr": error["eps"] ** 2,
        "snr_plus_one": error["v"] ** 2,
        "truncated_snr": np.maximum(error["x_0"] ** 2, error["eps"] ** 2),  # max(1, SNR) |x_0 error|^2
    }[weighting].mean((1, 2, 3))
    output = ProgressiveObjective(Denoiser(new_network(), SCHEDULE, kind), GRID, weighting).loss(batch)
    np.testing.assert_allclose(output.per_sample.numpy(), by_hand, rtol=1e-3)
    assert output.loss.item() == pytest.approx(by_hand.mean(), rel=1e-3)


def test_weights_are_functions_of_the_snr() -> None:
    snr = torch.tensor([0.004, 0.5, 1.0, 3.0, 1000.0])
    assert snr_weight(snr, "truncated_snr").tolist() == pytest.approx([1, 1, 1, 3, 1000])
    assert snr_weight(snr, "snr_plus_one").tolist() == pytest.approx([1.004, 1.5, 2, 4, 1001])
    assert torch.equal(snr_weight(snr, "snr"), snr)


def test_the_gradient_is_that_of_finite_differences() -> None:
    batch = make_batch(np.random.default_rng(1), 4)

    def loss(network: torch.nn.Module) -> Tensor:
        denoiser = Denoiser(network, SCHEDULE, "v_prediction")
        return ProgressiveObjective(denoiser, GRID, "truncated_snr").loss(batch).loss

    network = new_network()
    loss(network).backward()
    for name in ("gain", "bias"):
        step = 0.01
        values = []
        for sign in (1, -1):
            other = new_network()
            with torch.no_grad():
                other.get_parameter(name).add_(sign * step)
                values.append(float(loss(other)))
        gradient = network.get_parameter(name).grad
        assert gradient is not None
        # The loss is quadratic in either parameter, so central differences are exact but for rounding.
        assert gradient.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2)


def test_the_gradient_reaches_the_student_alone(problem: ImitationProblem) -> None:
    batch = batch_at(problem, scale=3.0)
    assert batch.label is not None
    assert not batch.label.requires_grad
    student = perturbed(problem.new_student())
    output = ProgressiveObjective(problem.student_denoiser(student), problem.grid, "truncated_snr").loss(batch)
    assert not output.per_sample.requires_grad
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in problem.teacher.unet.parameters())


def test_a_batch_without_labels_is_our_own_bug() -> None:
    batch = replace(make_batch(np.random.default_rng(0), 4), label=None)
    with pytest.raises(AssertionError, match="needs the expert's answers"):
        ProgressiveObjective(Denoiser(new_network(), SCHEDULE, "epsilon"), GRID, "snr").loss(batch)


def test_split_keeps_every_row_of_every_column_in_order() -> None:
    batch = make_batch(np.random.default_rng(0), 7)
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 3, 1]
    for name in ("x_t", "step_index", "guidance_scale", "label", "source", "policy_version", "staleness"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    embeddings = torch.cat([part.conditioning.embeddings for part in parts])
    assert torch.equal(embeddings, batch.conditioning.embeddings)
