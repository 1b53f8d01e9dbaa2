"""The imitation problem on the tiny pipeline, for tests of policies, engine and learner."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ddil_dist.config import load_config
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.problem import ImitationProblem

CPU = torch.device("cpu")


def tiny_problem(directory: Path, *overrides: str) -> ImitationProblem:
    """The problem of `directory`'s `pipeline/` and `data.parquet`: 8 teacher steps, 4 of the student."""
    config = load_config(
        None,
        [
            f"teacher.pipeline={directory / 'pipeline'}",
            f"data.path={directory / 'data.parquet'}",
            "teacher.steps=8",
            "student.steps=4",
            *overrides,
        ],
    )
    return ImitationProblem.create(config, CPU)


def perturbed(network: nn.Module, *, seed: int = 0, scale: float = 0.02) -> nn.Module:
    """The network after some training, as it were: every weight moved, the guidance embedding's too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def draw_states(problem: ImitationProblem, num: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
    """x_t, step index, conditioning and guidance scale of `num` arbitrary states, every grid point among them."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(num, *problem.teacher.latent_shape, generator=generator)
    step_index = torch.arange(num) % problem.grid.num_steps
    scales = 1 + 6 * torch.rand(num, generator=generator)
    prompts = [("a red square", "a blue circle", "ein grünes Dreieck")[i % 3] for i in range(num)]
    return x_t, step_index, problem.encoder.encode(prompts), scales
