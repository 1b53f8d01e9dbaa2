"""Denoisers against the U-Net itself, and the student's network against its teacher's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from ddil_dist.models.denoiser import Denoiser
from ddil_dist.models.student import copy_network
from ddil_dist.problem import ImitationProblem
from tests.support.problem import draw_states, perturbed, tiny_problem

PROJECTION = "time_embedding.cond_proj.weight"


@pytest.fixture(scope="module")
def problem(tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory)


def times(problem: ImitationProblem, num: int) -> torch.Tensor:
    return torch.tensor(problem.grid.student).repeat(num)[:num]


@torch.no_grad()
def test_prediction_is_the_unets_output_fed_as_diffusers_feeds_it(problem: ImitationProblem) -> None:
    network = perturbed(problem.new_student())
    x_t, _, conditioning, scales = draw_states(problem, 4)
    t = times(problem, 4)
    embedded = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=256)
    direct = network(x_t, t, encoder_hidden_states=conditioning.embeddings, timestep_cond=embedded).sample
    ours = problem.student_denoiser(network).predict(x_t, t, conditioning, scales)
    torch.testing.assert_close(ours, direct, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_half_precision_networks_take_and_give_float32(problem: ImitationProblem) -> None:
    x_t, _, conditioning, scales = draw_states(problem, 4)
    full = perturbed(problem.new_student())
    half = problem.new_student()
    half.load_state_dict(full.state_dict())
    wanted = problem.student_denoiser(full).predict(x_t, times(problem, 4), conditioning, scales)
    output = problem.student_denoiser(half.to(torch.bfloat16)).predict(x_t, times(problem, 4), conditioning, scales)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, wanted, rtol=0.1, atol=0.05)


class Wrapper(nn.Module):
    """As a data-parallel wrapper does: the network is its `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


@torch.no_grad()
def test_a_wrapped_network_is_still_told_its_scale(problem: ImitationProblem) -> None:
    network = perturbed(problem.new_student())
    x_t, _, conditioning, scales = draw_states(problem, 4)
    wrapped = Denoiser(Wrapper(Wrapper(network)), problem.teacher.schedule, "epsilon")
    plain = problem.student_denoiser(network)
    arguments = (x_t, times(problem, 4), conditioning)
    assert torch.equal(wrapped.predict(*arguments, scales), plain.predict(*arguments, scales))
    with pytest.raises(AssertionError, match="needs the scale"):
        wrapped.predict(*arguments)


def test_x_0_is_from_what_the_network_is_said_to_predict(problem: ImitationProblem) -> None:
    prediction, x_t = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = times(problem, 4)
    schedule = problem.teacher.schedule
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    wanted = {
        "epsilon": (x_t - sigma * prediction) / alpha,
        "v_prediction": alpha * x_t - sigma * prediction,
        "sample": prediction,
    }
    for kind, x_0 in wanted.items():
        denoiser = Denoiser(problem.teacher.unet, schedule, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(denoiser.x_0(prediction, x_t, t), x_0)


@torch.no_grad()
def test_a_new_student_is_its_teacher_at_every_guidance_scale(problem: ImitationProblem) -> None:
    x_t, _, conditioning, _ = draw_states(problem, 8)
    teacher = problem.teacher.denoiser().predict(x_t, times(problem, 8), conditioning)
    scales = torch.linspace(1, 14, 8)
    student = problem.student_denoiser(problem.new_student()).predict(x_t, times(problem, 8), conditioning, scales)
    torch.testing.assert_close(student, teacher, rtol=1e-5, atol=1e-6)


def test_a_student_has_one_parameter_more_than_its_teacher_and_shares_no_memory(problem: ImitationProblem) -> None:
    teacher, student = problem.teacher.unet.state_dict(), problem.new_student()
    weights = student.state_dict()
    assert weights.keys() - teacher.keys() == {PROJECTION}
    assert teacher.keys() - weights.keys() == set()
    for name, tensor in teacher.items():
        assert torch.equal(weights[name], tensor)
        assert weights[name].data_ptr() != tensor.data_ptr()
    assert not weights[PROJECTION].any()
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in problem.teacher.unet.parameters())


def test_the_student_of_a_half_precision_teacher_is_float32(tiny_directory: Path) -> None:
    problem = tiny_problem(tiny_directory, "teacher.precision=bfloat16")
    assert next(problem.teacher.unet.parameters()).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in copy_network(problem.teacher.unet, embeds_guidance=True).parameters()} == {
        torch.float32
    }


def test_the_guidance_embedding_learns_though_it_begins_at_zero(problem: ImitationProblem) -> None:
    student = problem.new_student()
    x_t, _, conditioning, scales = draw_states(problem, 4)
    problem.student_denoiser(student).predict(x_t, times(problem, 4), conditioning, scales).square().mean().backward()
    gradient = student.get_parameter(PROJECTION).grad
    assert gradient is not None
    assert gradient.abs().max() > 0
