"""What can be watched: TensorBoard's curves and pictures, grids of samples that nothing but the weights changes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image

from ddil_dist.config import RunConfig, load_config
from ddil_dist.errors import ConfigError
from ddil_dist.export import export_student
from ddil_dist.launch.inline import run_inline
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import seeded
from learner.assemble import create_accelerator
from learner.tracking import Look, SampleGrid, Tracking, Watch
from tests.support.problem import CPU, perturbed


@pytest.fixture(autouse=True)
def _own_accelerate_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def config_of(overrides: list[str], *more: str) -> RunConfig:
    return load_config(None, [*overrides, "evaluation.grid_images=3", *more])


def points(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in TensorBoard's event files, by name."""
    from tensorboardX.event_file_writer import RecordWriter  # noqa: F401 - the package that wrote them
    from tensorboardX.proto import event_pb2

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(directory.rglob("events.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[place : place + 8], "little")
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_a_run_leaves_curves_and_pictures(tiny_overrides: list[str]) -> None:
    config = config_of(tiny_overrides, "learner.updates=12", "learner.sample_every=5", "learner.checkpoint_every=12")
    assert run_inline(config)
    lines = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["update"]: line["loss"] for line in lines if line["kind"] == "update"}
    curves = points(config.run.path / "tensorboard")
    assert curves["loss"] == [(10, pytest.approx(losses[10])), (12, pytest.approx(losses[12]))]
    assert [step for step, _ in curves["samples"]] == [5, 10, 12]
    names = sorted(path.name for path in (config.run.path / "progress").glob("*.png"))
    assert names == ["update_00000005.png", "update_00000010.png", "update_00000012.png"]


def test_pictures_and_trackers_change_nothing_that_is_trained(tiny_overrides: list[str]) -> None:
    digests = []
    for name, more in (
        ("with", ["learner.sample_every=1"]),
        ("without", ["learner.sample_every=0", "learner.trackers=[]"]),
    ):
        config = config_of(tiny_overrides, f"run.name={name}", *more)
        assert run_inline(config)
        manifest = json.loads((config.run.path / "checkpoints" / "update_00000006" / "manifest.json").read_text())
        digests.append([manifest["files"][file]["digest"] for file in ("student.safetensors", "worker_0.safetensors")])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert digests[0] == digests[1]
    assert not (config.run.path / "progress").exists()
    assert not (config.run.path / "tensorboard").exists()


def test_a_grid_is_of_a_scale_that_the_student_is_trained_on(tiny_overrides: list[str]) -> None:
    pictures = []
    for chosen in ("null", "6", "9"):
        config = config_of(tiny_overrides, "teacher.guidance={min: 6, max: 16}", f"evaluation.guidance_scale={chosen}")
        problem = ImitationProblem.create(config, CPU)
        pictures.append(SampleGrid(config, problem, perturbed(problem.new_student())).save(1)[0])
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_a_grid_shows_what_is_exported(tiny_overrides: list[str]) -> None:
    """Not the projection that training may apply and stock pipelines do not."""
    config = config_of(
        tiny_overrides,
        *("objective.type=distribution_matching", "rollout.labels=learner", "student.spacing=trailing"),
        *("prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]", "thresholding={type: reflect, limit: 0.5}"),
    )
    problem = ImitationProblem.create(config, CPU)
    network = perturbed(problem.new_student())
    shown, _ = SampleGrid(config, problem, network).save(1)
    export_student(problem, network.state_dict(), config.run.path / "student")
    stock = StableDiffusionPipeline.from_pretrained(config.run.path / "student")
    stock.set_progress_bar_config(disable=True)
    prompts = list(dict.fromkeys(problem.prompts()))[:3]
    images = stock(
        prompts,
        num_inference_steps=4,
        guidance_scale=1.5,
        generator=seeded([config.evaluation.seed + row for row in range(3)]),
        output_type="np",
    ).images
    wanted = np.concatenate([(image * 255).round() for image in images], axis=1)
    assert np.abs(shown - wanted).max() <= 1


def test_a_grid_is_of_fixed_prompts_and_noise(tiny_overrides: list[str]) -> None:
    config = config_of(tiny_overrides)
    problem = ImitationProblem.create(config, CPU)
    network = perturbed(problem.new_student()).train()
    grid = SampleGrid(config, problem, network)
    first, look = grid.save(1)
    path = config.run.path / "progress" / "update_00000001.png"
    torch.randn(7)
    again, same = grid.save(2)
    assert look == same
    assert first.shape == (16, 3 * 16, 3)
    assert np.array_equal(first, again)
    assert np.array_equal(np.asarray(Image.open(path)), first)
    assert network.training
    perturbed(network, scale=0.1)
    assert not np.array_equal(grid.save(3)[0], first)


def test_a_tracker_whose_package_is_missing_is_refused_by_name(tiny_overrides: list[str]) -> None:
    config = config_of(tiny_overrides, "learner.trackers=[tensorboard, swanlab]")
    with pytest.raises(ConfigError, match=r"learner\.trackers: swanlab cannot be used, the package is not installed"):
        Tracking(config, create_accelerator(config, cpu=True))


def test_pictures_that_find_no_room_cost_no_run(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = config_of(tiny_overrides, "learner.updates=4", "learner.sample_every=1", "learner.checkpoint_every=4")
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        assert run_inline(config)
    assert [record.getMessage() for record in caplog.records if record.name == "learner.tracking"] == [
        "curves or pictures cannot be written ([Errno 28] No space left on device); the run goes on without them"
    ]


def test_the_look_is_beside_the_teachers(tiny_overrides: list[str], caplog: pytest.LogCaptureFixture) -> None:
    red, grey = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
    red[:, 0] = 1
    latents = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    assert Look.of(latents, red) == Look(pytest.approx(2**0.5), 1.0)
    assert Look.of(latents, grey).saturation == 0
    assert Look(3.0, 0.6).over(Look(2.0, 0.3)) == {"latent_std": 1.5, "saturation": pytest.approx(2.0)}
    assert Look(3.0, 0.6).over(Look(2.0, 0.01)) == {"latent_std": 1.5}
    config = config_of(tiny_overrides, "learner.updates=4", "learner.sample_every=2")
    assert run_inline(config)
    lines = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
    looks = [line for line in lines if line["kind"] == "look"]
    assert [line["update"] for line in looks] == [2, 4]
    assert all(line["latent_std"] > 0 for line in looks)
    assert json.loads((config.run.path / "progress" / "captions.json").read_text())


def test_a_drift_is_warned_of_once(tiny_overrides: list[str], caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tiny_overrides)
    problem = ImitationProblem.create(config, CPU)
    watch = Watch(config, problem, create_accelerator(config, cpu=True), problem.new_student())
    watch._tell({"latent_std": 1.1, "saturation": 1.2}, 10)
    assert [record for record in caplog.records if "drifts" in record.getMessage()] == []
    watch._tell({"latent_std": 1.3, "saturation": 1.2}, 20)
    watch._tell({"latent_std": 1.4, "saturation": 1.2}, 30)
    (record,) = [record for record in caplog.records if "drifts" in record.getMessage()]
    assert "update 20: the student's samples have 1.30 times the teacher's latent std" in record.getMessage()
