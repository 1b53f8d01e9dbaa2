"""Evaluating pipelines of one's own: every layout and kind of student, by paired error and speed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ddil_dist.evaluation.runs import evaluate_run, evaluation_networks
from ddil_dist.export import export_student
from ddil_dist.metrics.evaluate import EvaluationNetworks
from ddil_dist.metrics.features import ClassifierFeatures
from ddil_dist.metrics.results import read_results
from ddil_dist.metrics.trajectory import paired_trajectory_error
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import draw_noise, sample_student, sample_teacher, seeded
from tests.support.problem import tiny_problem
from tests.support.tiny import save_tiny_data, save_tiny_sdxl_pipeline

DATA_ONLY = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
KINDS = {
    "sdxl": ("teacher.guidance={min: 6, max: 16}",),
    "sdxl, consistency, an adapter": ("objective.type=consistency", DATA_ONLY, "student.lora={rank: 2}"),
    "sdxl, an explicit grid": ("student.timesteps=[751, 501, 251, 1]",),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluated")
    save_tiny_sdxl_pipeline(path / "pipeline")
    save_tiny_data(path / "data.parquet", num=4)
    return path


def evaluated(directory: Path, *overrides: str) -> ImitationProblem:
    return tiny_problem(directory, f"run.directory={directory}", "evaluation.num_images=3", *overrides)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_student_is_measured_as_what_it_is(directory: Path, kind: str) -> None:
    problem = evaluated(directory, *KINDS[kind])
    config = problem.config
    shutil.rmtree(config.run.path, ignore_errors=True)
    config.run.path.mkdir()
    network = problem.new_student()
    export_student(problem, network.state_dict(), config.run.path / "student")
    results = evaluate_run(config, console=Console(quiet=True))
    teacher, _, before, student = results.policies
    assert [policy.protocol.nfes_per_image for policy in results.policies] == [16, 8, 4, 4]
    assert student.protocol.sampler == ("LCM" if "consistency" in kind else "DDIM")
    scales = {policy.protocol.guidance_scale for policy in results.policies}
    assert scales == {6.0 if kind == "sdxl" else 1.5}
    assert results.facts["export_max_abs_difference"] < 1e-3
    assert "paired_trajectory_error" not in teacher.metrics
    seeds = [config.evaluation.seed + row for row in range(3)]
    generators = seeded(seeds)
    noise = draw_noise(generators, (4, 4, 4), problem.device)
    told = problem.encoder.encode([problem.prompts()[row] for row in range(3)])
    scale = torch.full((3,), scales.pop())
    wanted = paired_trajectory_error(
        sample_student(problem.student_policy(network), noise, told, scale, generators=generators, num_steps=4),
        sample_teacher(problem.teacher_policy(problem.teacher_grid(8)), noise, told, scale),
    )
    for policy in (before, student):
        assert policy.metrics["paired_trajectory_error"] == pytest.approx(wanted, rel=1e-3)
        assert policy.seconds_per_image > 0


def test_the_teacher_is_compared_on_the_steps_that_label(directory: Path) -> None:
    problem = evaluated(directory, "student.timesteps=[751, 501, 251, 1]", "teacher.steps=4")
    assert problem.teacher_grid(4).student == (751, 501, 251, 1)
    problem = evaluated(directory, "student.spacing=leading")
    labels = [t for row in problem.grid.teacher for t in row[:-1]]
    assert list(problem.teacher_grid(8).student) == labels
    assert problem.teacher_grid(4).student == (801, 601, 401, 201)
    assert problem.teacher_grid(2).student == (667, 334)


def test_a_run_of_one_s_own_model_is_measured_by_what_is_at_hand(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddil_dist.builtin import CLIP_DIR
    from ddil_dist.launch.__main__ import main as launch

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    measured = [*tiny_overrides, "evaluation.num_images=4", f"evaluation.clip=local-dir:{CLIP_DIR}"]
    assert launch([*measured, "evaluation.inception=/nowhere.pth"]) == 2
    told = capsys.readouterr()
    assert "evaluation.inception: no file at '/nowhere.pth'" in told.err
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists(), "nothing is trained for it"
    assert launch(measured) == 0
    told = capsys.readouterr()
    assert "not measured at the end: FID, density and coverage need Inception v3: put weights-inception" in told.out
    assert "or name it by evaluation.inception" in told.out
    assert "the CLIP score needs" not in told.out
    student = next(p for p in read_results(tmp_path / "runs" / "tiny" / "results.json").policies if p.role == "student")
    assert {"clip_score", "paired_trajectory_error"} <= student.metrics.keys()
    assert "fid" not in student.metrics


def test_fid_of_one_s_own_model_compares_with_the_run_s_data(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Means(torch.nn.Module):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3))

    networks = EvaluationNetworks(features=ClassifierFeatures(Means()))
    monkeypatch.setattr("ddil_dist.evaluation.networks.load_networks", lambda choice, *, device: (networks, []))
    problem = tiny_problem(tiny_directory, "evaluation.real_images=20", "evaluation.batch_size=8")
    found = evaluation_networks(problem.config, problem)
    assert found is not None
    assert found.reference is not None
    real = (problem.open_data().images(range(20))[0] + 1) / 2
    assert found.reference.count == 20
    torch.testing.assert_close(found.reference.mean, real.mean((2, 3)).double().mean(0))
