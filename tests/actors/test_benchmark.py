"""The loop that the engine is measured against makes the same states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddil_dist.sampling import draw_noise, seeded
from ddil_dist.states import to_tensor
from tests.benchmarks.engine.versus import GUIDANCE_SCALE, Lockstep, StockLoop
from tests.support.problem import CPU, tiny_problem


@pytest.mark.parametrize("student", [True, False])
def test_a_stock_loop_visits_the_policys_own_states(tiny_directory: Path, student: bool) -> None:
    problem = tiny_problem(tiny_directory)
    kept = StockLoop(problem, 2).roll(student=student)
    x = draw_noise(seeded(range(2)), problem.teacher.latent_shape, CPU)
    told = (problem.encoder.encode(problem.prompts()[:2]), torch.full((2,), GUIDANCE_SCALE))
    move = problem.student_policy(problem.new_student().eval()).step if student else problem.teacher_policy().solve
    assert len(kept) == problem.grid.num_steps - 1
    for index, latents in enumerate(kept):
        with torch.no_grad():
            x = move(x, torch.full((2,), index), *told)
        theirs = to_tensor(latents)
        torch.testing.assert_close(theirs, x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("masked", [True, False])
def test_lockstep_calls_both_policies(tiny_directory: Path, masked: bool) -> None:
    problem = tiny_problem(tiny_directory)
    lockstep = Lockstep(problem, 4, masked=masked)
    rows: dict[str, list[int]] = {"teacher": [], "student": []}
    for name, network in (("teacher", problem.teacher.unet), ("student", lockstep._student._denoiser.unet)):
        network.register_forward_pre_hook(lambda _, inputs, name=name: rows[name].append(len(inputs[0])))
    lockstep.states_per_s(0.5)
    if masked:
        assert set(rows["student"]) == {4}
        assert set(rows["teacher"]) == {8}, "guided, so twice the rows"
    else:
        # Every transition of every row is made once, by one policy.
        assert sum(rows["student"]) + sum(rows["teacher"]) / (2 * problem.grid.substeps) == 4 * 3
