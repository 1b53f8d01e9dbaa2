"""What the launcher refuses or tells before any work starts, and after a training whose evaluation fails."""

from __future__ import annotations

import errno
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from ddil_dist.config import load_config
from ddil_dist.evaluation import runs
from ddil_dist.launch.__main__ import main
from ddil_dist.launch.ours import changed


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_more_images_than_there_are_prompts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, f"run.directory={tmp_path}", "evaluation.num_images=2000")
    assert told == (
        "ddil_dist: evaluation.num_images: 2000; the built-in problem has 1000 evaluation prompts: set 1000 or less\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_of_ones_own_is_not_trained_on_the_builtin_pictures_unasked(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (f"run.directory={tmp_path}", f"teacher.pipeline={tiny_directory / 'pipeline'}")
    assert "ddil_dist: data.path: is not given, and teacher.pipeline is" in refused(capsys, *own)
    assert main([*own, "data.path=builtin", "--dry-run"]) == 0


def test_a_hub_id_without_a_network_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        told = refused(capsys, f"run.directory={tmp_path}", "teacher.pipeline=no/such", "data.path=builtin")
    assert told.startswith(
        "ddil_dist: teacher.pipeline: no directory at 'no/such', nothing of that id in the hub's cache"
    )
    assert "127.0.0.1 is not reached" in told
    assert "hf download no/such" in told


def test_gpus_that_are_not_there_are_refused_by_the_keys_that_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    told = refused(capsys, f"run.directory={tmp_path}", "learner.num_gpus=1", "rollout.num_gpus=0.5")
    assert "learner.num_gpus (1 in all) and rollout.num_gpus (0.5 in all) ask for 1.5 GPUs" in told
    assert "this machine has 1" in told


def test_weights_are_counted_once_however_many_variants_lie_there(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny_directory / "pipeline", pipeline)

    def plan() -> list[str]:
        assert main([f"teacher.pipeline={pipeline}", "data.path=builtin", "--dry-run"]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "MiB" in line]

    once = plan()
    for folder in ("unet", "vae"):
        weights = pipeline / folder / "diffusion_pytorch_model.safetensors"
        for variant in ("fp16", "non_ema"):
            shutil.copy(weights, weights.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    assert plan() == once


def test_what_a_resumed_run_goes_on_with_is_said(tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny_overrides, "learner.updates=2"]) == 0
    capsys.readouterr()
    assert main([*tiny_overrides, "learner.updates=4", "learner.optimizer.learning_rate=0.0001"]) == 0
    told = capsys.readouterr().out
    assert "ddil_dist: learner.optimizer.learning_rate was 0.0005 so far, and is 0.0001 from now on" in told
    assert "ddil_dist: learner.updates was 2 so far, and is 4 from now on" in told


def test_an_evaluation_that_fails_costs_neither_student_nor_report(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the network of a metric is broken")

    monkeypatch.setattr(runs, "evaluate_run", fail)
    overrides = [*tiny_overrides, "learner.updates=2", "evaluation.num_images=2"]
    assert main(overrides) == 1
    said = capsys.readouterr()
    path = load_config(None, overrides).run.path
    assert (path / "report.html").is_file()
    assert (path / "student" / "model_index.json").is_file()
    assert f"report   {path / 'report.html'}" in said.out
    assert "its evaluation failed: the network of a metric is broken" in said.err
    assert "its evaluation failed: the network of a metric is broken" in (path / "report.html").read_text()
    assert f"python -m ddil_dist.evaluate {path}" in said.err
    monkeypatch.undo()
    assert main(overrides) == 0, "the same command ends what is left to do"


def test_a_full_disk_is_a_line(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/file")

    monkeypatch.setattr("ddil_dist.launch.inline.run_inline", full)
    assert main(tiny_overrides) == 1
    assert "No space left on device: '/disk/file'; free some room" in capsys.readouterr().err


def test_a_configuration_that_finds_no_room_leaves_nothing_half_written(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, *told: str, **more: str) -> int:
        if path.suffix == ".partial":
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *told, **more)

    monkeypatch.setattr(Path, "write_text", full)
    assert main(tiny_overrides) == 1
    assert list(load_config(None, tiny_overrides).run.path.glob("*.partial")) == []


def test_a_cluster_where_nobody_listens_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        for prefix in ("", "ray://"):
            monkeypatch.setenv("RAY_ADDRESS", prefix + address)
            told = refused(capsys, f"run.directory={tmp_path}")
            assert told.startswith(f"ddil_dist: RAY_ADDRESS: nobody listens at {prefix}{address} (")
            assert "unset it for a Ray of this machine" in told


def test_a_long_temporary_directory_is_named_with_what_to_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", f"/scratch/{'x' * 60}")
    told = refused(capsys, f"run.directory={tmp_path}")
    assert told.startswith(f"ddil_dist: TMPDIR: '/scratch/{'x' * 60}' is too long for Ray's sockets")
    assert "set RAY_TMPDIR=/tmp" in told


def test_a_file_system_without_locks_is_not_called_another_process(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    told = refused(capsys, *tiny_overrides)
    assert "has no locks ([Errno 37] No locks available)" in told
    assert "another process" not in told


def test_a_job_takes_no_runs_files_along(tiny_overrides: list[str]) -> None:
    from ray._private.runtime_env.packaging import _dir_travel

    assert main([*tiny_overrides, "learner.updates=1"]) == 0
    path = load_config(None, tiny_overrides).run.path
    uploaded: list[Path] = []
    _dir_travel(path.parent, [], uploaded.append, include_gitignore=True)
    assert [file for file in uploaded if file.is_file()] == []


@pytest.mark.parametrize("execution", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_folders_of_our_names_in_the_working_directory_are_passed_over(
    tiny_overrides: list[str], tmp_path: Path, execution: str
) -> None:
    for name in ("actors", "learner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')\n", encoding="utf-8")
    command = [sys.executable, "-m", "ddil_dist.launch", *tiny_overrides, f"run.execution={execution}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"passing over {tmp_path / 'learner'}" in done.stdout


def test_what_other_processes_would_not_see_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from learner.methods import factory, progressive

    assert changed() == []
    with monkeypatch.context() as patch:
        patch.setattr(factory, "create_objective", lambda *told, **more: None)
        patch.setattr(progressive.ProgressiveObjective, "loss", lambda *told: None)
        assert changed() == [
            "learner.methods.factory.create_objective",
            "learner.methods.progressive.ProgressiveObjective.loss",
        ]
        told = refused(capsys, f"run.directory={tmp_path}")
    assert told.startswith("ddil_dist: run.execution: learner.methods.factory.create_objective, learner.methods.")
    assert "set run.execution=inline" in told

    class Mine(progressive.ProgressiveObjective):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(progressive, "ProgressiveObjective", Mine)
        assert changed() == ["learner.methods.progressive.ProgressiveObjective"]
