"""Exporting a student: whole or absent, and stock. `test_policy.py` holds its latents to the student's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline

from ddil_dist.diffusion.grid import timestep_grid
from ddil_dist.export import export_student
from ddil_dist.problem import ImitationProblem
from tests.support.problem import perturbed, tiny_problem


@pytest.fixture(scope="module")
def problem(tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory)


def test_what_is_exported_loads_with_stock_diffusers(problem: ImitationProblem, tmp_path: Path) -> None:
    weights = perturbed(problem.new_student()).state_dict()
    export_student(problem, weights, tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(pipeline) is StableDiffusionPipeline
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
    pipeline.scheduler.set_timesteps(4)
    assert tuple(pipeline.scheduler.timesteps.tolist()) == timestep_grid(4, spacing="linspace")
    loaded = pipeline.unet.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    for part in ("vae", "text_encoder"):
        theirs = getattr(problem.teacher.pipeline, part).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in getattr(pipeline, part).state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} == {"student"}


def test_an_export_replaces_the_one_before(problem: ImitationProblem, tmp_path: Path) -> None:
    path = tmp_path / "student"
    for seed in (1, 2):
        weights = perturbed(problem.new_student(), seed=seed).state_dict()
        export_student(problem, weights, path)
        (path / f"left_by_{seed}").touch()
    assert {file.name for file in path.glob("left_by_*")} == {"left_by_2"}
    loaded = StableDiffusionPipeline.from_pretrained(path).unet.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_failed_export_leaves_the_one_before_and_nothing_else(
    problem: ImitationProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = problem.new_student().state_dict()
    path = tmp_path / "student"
    export_student(problem, weights, path)
    before = {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    save = StableDiffusionPipeline.save_pretrained

    def save_and_fail(self: StableDiffusionPipeline, directory: Path, **options: object) -> None:
        save(self, directory, **options)
        raise OSError("no space left on device")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", save_and_fail)
    with pytest.raises(OSError, match="no space"):
        export_student(problem, weights, path)
    assert {file.name for file in tmp_path.iterdir()} == {"student"}
    assert {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_weights_of_another_network_are_refused_before_anything_is_written(
    problem: ImitationProblem, tmp_path: Path
) -> None:
    weights = problem.new_student().state_dict()
    weights.pop("conv_in.weight")
    with pytest.raises(RuntimeError, match=r"conv_in\.weight"):
        export_student(problem, weights, tmp_path / "student")
    assert not list(tmp_path.iterdir())
