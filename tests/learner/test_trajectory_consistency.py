"""Trajectory consistency: its loss where all trajectories are known, where it leads to, and its segments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddil_dist.diffusion.ddim import ddim_step
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.methods import TrajectoryConsistency
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.states import States
from learner.methods.trajectory_consistency import TrajectoryConsistencyObjective, segment_ends
from tests.learner.support import SCHEDULE, make_batch

GRID = TrajectoryGrid.create(10, 10, spacing="trailing")
POINTS = torch.tensor((*GRID.student, -1))


class Says(nn.Module):
    """x_0 is `value`, whatever it is asked."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.config = {"time_cond_proj_dim": None}
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, t: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (self.value.expand_as(x),)


def labelled(num: int, x_0: float) -> States[Tensor]:
    """States of every grid point, whose trajectories all end at `x_0`."""
    batch = make_batch(np.random.default_rng(0), num)
    index = torch.arange(num) % 10
    t, u = POINTS[index], POINTS[index + 1]
    label = ddim_step(batch.x_t, torch.full_like(batch.x_t, x_0), t, u, schedule=SCHEDULE)
    return replace(batch, step_index=index, label=label)


def objective_of(student: nn.Module, segments: int = 1, **settings: Any) -> TrajectoryConsistencyObjective:
    method = TrajectoryConsistency(solver_steps=10, sampler_steps=(2,), segments=segments, huber_c=1e-6, **settings)
    objective = TrajectoryConsistencyObjective(Denoiser(student, SCHEDULE, "sample"), GRID, method, lambda x_0: x_0)
    objective.segment_ends = segment_ends(segments, 10)
    return objective


def test_the_student_that_knows_where_all_trajectories_end_has_no_loss() -> None:
    assert float(objective_of(Says(0.7)).loss(labelled(40, 0.7)).per_sample.max()) < 2e-6


def test_an_error_counts_by_its_part_of_the_state_that_is_led_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """x_s - x_s' = (alpha_s - sigma_s alpha_t / sigma_t) (x^ - x~), as the teacher's side makes no error."""
    student = Says(0.7)
    objective = objective_of(student, target="average")
    with torch.no_grad():
        student.value.add_(0.25)
    batch = labelled(40, 0.7)
    led_to: list[Tensor] = []
    later = objective._later
    monkeypatch.setattr(objective, "_later", lambda index: led_to.append(later(index)) or led_to[-1])
    found = objective.loss(batch).per_sample
    t, (s,) = POINTS[batch.step_index], led_to
    alpha, sigma = (part.double().flatten() for part in (SCHEDULE.alpha(s), SCHEDULE.sigma(s)))
    ratio = (SCHEDULE.alpha(t) / SCHEDULE.sigma(t)).double().flatten()
    np.testing.assert_allclose(found.numpy(), (0.25 * (alpha - sigma * ratio)).abs().numpy(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("segments", "ends"),
    [(1, [10] * 10), (2, [5] * 5 + [10] * 5), (3, [3] * 3 + [6] * 3 + [10] * 4), (10, list(range(1, 11)))],
)
def test_it_leads_to_every_later_point_of_its_segment_and_to_none_beyond(segments: int, ends: list[int]) -> None:
    assert segment_ends(segments, 10).tolist() == ends
    objective = objective_of(Says(0.0), segments)
    points = [*GRID.student, 0]
    torch.manual_seed(0)
    for index in range(10):
        found = set(objective._later(torch.full((400,), index)).tolist())
        assert found == {points[position] for position in range(index + 1, ends[index] + 1)}
