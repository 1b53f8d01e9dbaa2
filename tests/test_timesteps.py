"""What depends on how many timesteps the teacher was trained on is checked against them, and before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddil_dist.errors import ConfigError
from ddil_dist.launch.__main__ import main
from tests.methods.contract import check_export
from tests.support.problem import tiny_problem
from tests.support.tiny import save_tiny_data, save_tiny_pipeline

HALF = "prior.parts=[{until: 1, forward: 0.5, student: 0.5, teacher: 0}]"
CONSISTENCY = ("objective.type=consistency", HALF)
FEW = 96
"""Of which 48 and 32 are divisors, and not 50; of which diffusers makes 47 trailing steps 48."""


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of `FEW` timesteps."""
    directory = tmp_path_factory.mktemp("few")
    save_tiny_pipeline(directory / "pipeline", num_train_timesteps=FEW)
    save_tiny_data(directory / "data.parquet", num=4)
    return directory


def trailing(steps: int) -> tuple[str, ...]:
    return (f"student.steps={steps}", f"teacher.steps={steps}", "student.spacing=trailing")


def test_a_solver_skips_whole_timesteps_of_its_teacher(few: Path, tiny_directory: Path, tmp_path: Path) -> None:
    problem = tiny_problem(few, *CONSISTENCY, "objective.solver_steps=32")
    assert problem.grid.student == tuple(range(95, 0, -3))
    check_export(problem, tmp_path / "student")
    with pytest.raises(ConfigError, match=r"objective.solver_steps: 50 does not divide 96, .* a divisor such as 48"):
        tiny_problem(few, *CONSISTENCY)
    with pytest.raises(ConfigError, match=r"objective.solver_steps: 32 does not divide 1000, .* a divisor such as 25"):
        tiny_problem(tiny_directory, *CONSISTENCY, "objective.solver_steps=32")


def test_a_trailing_grid_has_as_many_points_as_steps(few: Path, tiny_directory: Path) -> None:
    assert tiny_problem(few, "student.spacing=trailing").grid.student == (95, 71, 47, 23)
    assert tiny_problem(tiny_directory, *trailing(47)).grid.num_steps == 47
    with pytest.raises(ConfigError, match=r"student.steps: 47 of 96 timesteps are a step too many"):
        tiny_problem(few, *trailing(47))
    with pytest.raises(ConfigError, match=r"student.steps: 61 of 1000 timesteps are a step too many"):
        tiny_problem(tiny_directory, *trailing(61))


def test_a_launch_refuses_them_before_any_work(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"teacher.pipeline={few / 'pipeline'}", f"data.path={few / 'data.parquet'}", f"run.directory={tmp_path}"]
    stages = "curriculum.stages=[{student: {steps: 8}}, {student: {steps: 47}, teacher: {steps: 47}}]"
    for overrides in (
        trailing(47),
        ("teacher.steps=8", "student.spacing=trailing", stages, "curriculum.teacher=original"),
    ):
        assert main([*places, *overrides]) == 2
        assert "student.steps: 47 of 96 timesteps" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
