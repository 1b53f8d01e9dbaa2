"""`python -m ddil_dist.analyze` on a tiny run: what it writes, says and refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ddil_dist.analysis.results import ANALYSIS_FILE, read_analysis
from ddil_dist.analyze import main
from ddil_dist.config import dump_config, load_config
from ddil_dist.export import export_student
from tests.support.problem import perturbed, tiny_problem


@pytest.fixture(scope="module")
def run(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has its student and nothing else."""
    directory = tmp_path_factory.mktemp("analyzed")
    problem = tiny_problem(tiny_directory, f"run.directory={directory}", "run.name=tiny", "evaluation.num_images=4")
    path = problem.config.run.path
    path.mkdir()
    (path / "config.yaml").write_text(dump_config(problem.config), encoding="utf-8")
    network = perturbed(problem.new_student(), scale=0.05)
    export_student(problem, network.state_dict(), path / "student")
    return path


def test_a_run_is_analysed_and_its_report_says_what_was_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--states", "8"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = read_analysis(run / ANALYSIS_FILE)
    assert [point.timestep for point in found.shift.points] == [999, 749, 500, 250]
    assert len(found.mixtures) == 12
    assert found.protocol["num_states"] == 8
    assert found.protocol["error"] == "of the next latents"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'href="#shift"' in page
    assert "Who begins, and who must end" in page
    assert "covariate shift" in printed
    assert "This rests on 8 trajectories" in printed


def test_no_images_no_mixtures(run: Path) -> None:
    assert main([str(run), "--states", "8", "--images", "0"]) == 0
    assert read_analysis(run / ANALYSIS_FILE).mixtures == []


def test_bad_input_is_refused_before_anything_is_sampled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        (run / ANALYSIS_FILE).unlink(missing_ok=True)
        assert main([str(run), *arguments]) == 2
        assert not (run / ANALYSIS_FILE).exists()
        return " ".join(capsys.readouterr().err.split())

    assert "--states: 3; must be 8 or more" in refused("--states", "3")
    assert "--images: 1; must be 0, or 2 or more" in refused("--images", "1")
    assert "is no pipeline's directory" in refused("--student", str(tmp_path))
    other = tmp_path / "other"
    shutil.copytree(run / "student", other)
    config = load_config(run / "config.yaml")
    problem = tiny_problem(Path(str(config.data.path)).parent, "student.spacing=trailing")
    export_student(problem, problem.new_student().state_dict(), other)
    told = refused("--student", str(other))
    assert "runs on the timesteps [999, 749, 499, 249], the run's grid is [999, 749, 500, 250]" in told
