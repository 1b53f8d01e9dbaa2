"""The end of a run: a student is there once it was verified, at a guidance scale that it knows, and never before."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddil_dist import export
from ddil_dist.best import read_best
from ddil_dist.config import RunConfig, load_config
from ddil_dist.errors import ExportError
from ddil_dist.launch import finish
from ddil_dist.launch.finish import export_best, export_run, finish_run, is_finished, is_trained
from ddil_dist.launch.inline import run_inline
from ddil_dist.metrics.results import read_results

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def trained(tiny_overrides: list[str], request: pytest.FixtureRequest) -> RunConfig:
    more = ["learner.updates=2", "learner.checkpoint_every=2", "learner.sample_every=0", "learner.trackers=[]"]
    config = load_config(None, [*tiny_overrides, *more, "teacher.guidance={min: 6, max: 9}", *request.param])
    assert run_inline(config)
    return config


def damage(pipeline: Any) -> None:
    """Another weight in the file than the student's."""
    weights = load_file(pipeline / WEIGHTS)
    weights["conv_out.bias"] += 1
    save_file(weights, pipeline / WEIGHTS, metadata={"format": "pt"})


FULL, ADAPTER = (), ("student.lora={rank: 2}",)
WORSENING = (
    "learner.keep_best={every: 1, images: 2}",
    "learner.optimizer={warmup_updates: 0, schedule: constant}",
    "learner.ema_decay=0",
)
RATES = "learner.optimizer.learning_rate=0.002", "learner.optimizer.learning_rate=0.5"
"""Of all of the network and of an adapter: the second update's student is worse than the first's."""


@pytest.mark.parametrize("trained", [FULL], indirect=True)
def test_an_export_that_fails_its_check_is_no_student(trained: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_run(trained)
    assert is_finished(trained)
    earlier = load_file(trained.run.path / "student" / WEIGHTS)

    def export_damaged(problem: Any, weights: Any, path: Any) -> None:
        export.export_student(problem, weights, path)
        damage(path)

    monkeypatch.setattr(finish, "export_student", export_damaged)
    with pytest.raises(ExportError, match=r"student\.unverified: .* is not the student that was trained"):
        finish_run(trained)
    assert is_trained(trained)
    assert not is_finished(trained), "by the mark of an earlier end"
    with safe_open(trained.run.path / "student" / WEIGHTS, "pt") as file:
        assert (file.get_tensor("conv_out.bias") == earlier["conv_out.bias"]).all()
    failed = load_file(trained.run.path / "student.unverified" / WEIGHTS)
    assert (failed["conv_out.bias"] - earlier["conv_out.bias"]).min() > 0.9

    monkeypatch.undo()
    finish_run(trained)
    assert is_finished(trained)
    assert not (trained.run.path / "student.unverified").exists()


@pytest.mark.parametrize("trained", [FULL, ADAPTER], indirect=True)
def test_a_verified_student_is_where_it_belongs(trained: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []

    def verify(*arguments: Any, guidance_scale: float) -> float:
        scales.append(guidance_scale)
        assert not (trained.run.path / "student").exists()
        return export.verify_export(*arguments, guidance_scale=guidance_scale)

    monkeypatch.setattr(finish, "verify_export", verify)
    assert export_run(trained) == trained.run.path / "student"
    assert scales == [6.0]
    DiffusionPipeline.from_pretrained(trained.run.path / "student")
    found = sorted(path.name for path in trained.run.path.glob("student*"))
    assert found == (["student"] if trained.student.lora is None else ["student", "student_lora"])


@pytest.mark.parametrize("trained", [FULL], indirect=True)
def test_asking_whether_a_run_is_trained_sets_nothing_aside(trained: RunConfig) -> None:
    assert is_trained(trained)
    last = trained.run.path / "checkpoints" / "update_00000002"
    (last / "student.safetensors").write_bytes(b"garbage")
    assert not is_trained(trained)
    assert last.is_dir()


@pytest.mark.parametrize("trained", [FULL], indirect=True)
def test_a_finished_run_that_was_trained_on_is_not_finished(trained: RunConfig) -> None:
    finish_run(trained)
    longer = trained.model_copy(update={"learner": trained.learner.model_copy(update={"updates": 3})})
    assert run_inline(longer)
    assert is_trained(longer)
    assert not is_finished(longer), "its student and its report are of the second update"
    finish_run(longer)
    assert is_finished(longer)


@pytest.mark.parametrize("trained", [(*WORSENING, RATES[0]), (*WORSENING, RATES[1], *ADAPTER)], indirect=True)
def test_the_best_student_is_exported_beside_the_last(
    trained: RunConfig, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    evaluated = trained.model_copy(update={"evaluation": trained.evaluation.model_copy(update={"num_images": 2})})
    finish_run(evaluated)
    kept = read_best(trained.run.path / "kept")
    assert kept is not None
    assert kept.last_value is not None
    assert (kept.update, kept.last_update) == (1, 2)
    directory = trained.run.path / "student_best"
    assert read_best(directory) == kept
    DiffusionPipeline.from_pretrained(directory)
    if trained.student.lora is None:
        exported = load_file(directory / WEIGHTS)
        for name, tensor in load_file(trained.run.path / "kept" / kept.file).items():
            if "cond_proj" not in name:
                assert (exported[name] == tensor).all(), name
    else:
        assert (trained.run.path / "student_best_lora").is_dir()
    told = f"update 1: paired error {kept.value:.4f} on 2 held-out images, the last, of update 2, {kept.last_value:.4f}"
    assert f"best     {directory} ({told})" in capsys.readouterr().out
    card = (directory / "README.md").read_text()
    assert f"- The best of its training, kept at {told}." in card
    assert 'from_pretrained("student_best")' in card
    assert "The best of its training" not in (trained.run.path / "student" / "README.md").read_text()
    results = read_results(trained.run.path / "results.json")
    assert [policy.name for policy in results.policies][3:] == ["student, 4 steps", "best, update 1"]
    assert results.policies[4].metrics != results.policies[3].metrics
    found = results.facts["best"]
    assert (found["metric"], found["update"], found["value"]) == ("paired_trajectory_error", 1, kept.value)
    assert found["ahead"] == pytest.approx(kept.last_value - kept.value)

    (trained.run.path / "kept" / kept.file).write_bytes(b"garbage")
    assert export_best(trained) is None
    assert "there is no student_best" in caplog.text
