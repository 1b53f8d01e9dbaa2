"""Grids against diffusers' DPM-Solver++ scheduler, and the student's points against the teacher's."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler

from ddil_dist.diffusion.grid import Spacing, TrajectoryGrid, timestep_grid
from ddil_dist.errors import ConfigError
from ddil_dist.types import FINAL_TIMESTEP

SPACINGS: tuple[Spacing, ...] = ("linspace", "trailing", "leading")


def test_four_steps_are_those_of_the_literature() -> None:
    assert timestep_grid(4, spacing="linspace") == (999, 749, 500, 250)
    assert timestep_grid(4, spacing="trailing") == (999, 749, 499, 249)
    assert timestep_grid(4, spacing="leading") == (801, 601, 401, 201)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_is_on_the_grid_of_dpm_solver(spacing: Spacing) -> None:
    scheduler = DPMSolverMultistepScheduler(
        timestep_spacing=spacing, algorithm_type="dpmsolver++", solver_order=1, steps_offset=1
    )
    for num_steps in [*range(1, 129), 150, 199, 200, 250, 256, 333, 500]:
        scheduler.set_timesteps(num_steps)
        theirs = scheduler.timesteps.tolist()
        if spacing == "trailing" and len(theirs) > num_steps:
            # diffusers' arange makes a step too many of a few counts; no student may have them (see test_config).
            assert theirs.pop() == -1
            assert num_steps == 61 or num_steps > 64
        assert timestep_grid(num_steps, spacing=spacing) == tuple(theirs), num_steps


def test_a_point_that_rounds_differently_on_the_two_grids_is_the_students() -> None:
    # 499.5 is a float below it on the grid of 26 steps and rounds down there.
    assert timestep_grid(26, spacing="linspace")[13] == 499
    assert TrajectoryGrid.create(2, 26, spacing="linspace").student == (999, 500)
    assert [row[0] for row in TrajectoryGrid.create(16, 48, spacing="trailing").teacher] == list(
        timestep_grid(16, spacing="trailing")
    )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_train_timesteps", [1000, 100])
def test_student_points_are_teacher_points_for_every_pair(spacing: Spacing, num_train_timesteps: int) -> None:
    most = num_train_timesteps // 2
    for student in range(1, min(64, most) + 1):
        for substeps in range(1, most // student + 1):
            if spacing == "leading" and substeps > num_train_timesteps // (student + 1):
                break  # more substeps than timesteps between two points: refused, below
            grid = TrajectoryGrid.create(
                student, student * substeps, spacing=spacing, num_train_timesteps=num_train_timesteps
            )
            assert grid.num_steps == student
            assert grid.substeps == substeps
            flat = [t for row in grid.teacher for t in row[:-1]] + [FINAL_TIMESTEP]
            assert all(a > b for a, b in itertools.pairwise(flat)), "the teacher's grid must fall strictly"
            assert tuple(row[0] for row in grid.teacher) == grid.student
            assert tuple(row[-1] for row in grid.teacher) == (*grid.student[1:], FINAL_TIMESTEP)


def test_a_row_holds_the_substeps_of_one_student_step() -> None:
    grid = TrajectoryGrid.create(4, 8, spacing="linspace")
    assert grid.teacher == ((999, 874, 749), (749, 624, 500), (500, 375, 250), (250, 125, FINAL_TIMESTEP))
    assert [grid.next_timestep(i) for i in range(4)] == [749, 500, 250, FINAL_TIMESTEP]
    assert grid.teacher_table().tolist() == [list(row) for row in grid.teacher]


def test_the_grid_of_a_consistency_solver_is_that_of_the_lcm_scheduler() -> None:
    scheduler = LCMScheduler()
    scheduler.set_timesteps(50, original_inference_steps=50)
    assert timestep_grid(50, spacing="trailing") == tuple(scheduler.timesteps.tolist())
    assert timestep_grid(50, spacing="trailing")[-2:] == (39, 19)


def test_a_grid_through_given_points_spreads_the_teachers_substeps_evenly() -> None:
    grid = TrajectoryGrid.through((901, 400, 7), 4)
    assert grid.student == (901, 400, 7)
    assert grid.teacher == ((901, 776, 650, 525, 400), (400, 302, 204, 105, 7), (7, 5, 3, 1, FINAL_TIMESTEP))
    single = TrajectoryGrid.through(timestep_grid(50, spacing="trailing"), 1)
    assert single.teacher[0] == (999, 979)
    assert single.teacher[-1] == (19, FINAL_TIMESTEP)


def test_points_too_close_for_the_teachers_substeps_are_refused() -> None:
    TrajectoryGrid.through((9, 5), 4)
    with pytest.raises(ConfigError, match=r"teacher\.steps: 5 teacher steps do not fit between .* 9 and 5"):
        TrajectoryGrid.through((9, 5), 5)


def test_step_index_inverts_the_grid_and_refuses_other_timesteps() -> None:
    grid = TrajectoryGrid.create(4, 8, spacing="linspace")
    assert grid.step_index(torch.tensor([250, 999, 500, 749, 250])).tolist() == [3, 0, 2, 1, 3]
    with pytest.raises(AssertionError, match="not on the student grid"):
        grid.step_index(torch.tensor([999, 874]))


@pytest.mark.parametrize("num_steps", [0, 501])
def test_a_step_count_without_a_grid_names_the_rule(num_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"{num_steps} steps.* 1 to 500"):
        timestep_grid(num_steps, spacing="linspace")
