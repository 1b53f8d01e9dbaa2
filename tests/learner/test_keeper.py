"""The best student by a held-out metric: measured on noise of its own, kept through restarts, changing nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from ddil_dist.best import KEPT_DIRECTORY, Best, Measure, read_best
from ddil_dist.config import RunConfig, load_config
from ddil_dist.errors import ConfigError
from ddil_dist.journal import Journal, read_journal
from ddil_dist.launch.inline import run_inline
from ddil_dist.metrics.trajectory import paired_trajectory_error
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import draw_noise, sample_student, sample_teacher, seeded
from learner import keeper as keeper_module
from learner.held_out import SEED_OFFSET, HeldOut
from learner.keeper import Keeper
from learner.state_file import encode_state
from learner.training_state import random_state
from tests.learner.support import learner_config, make_trainer
from tests.support.problem import CPU, perturbed

KEEP = "learner.keep_best={every: 1, images: 5}"


@pytest.fixture(autouse=True)
def _own_accelerate_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def problem(tiny_overrides: list[str]) -> ImitationProblem:
    return ImitationProblem.create(load_config(None, [*tiny_overrides, KEEP, "evaluation.batch_size=3"]), CPU)


def measure_of(config: RunConfig) -> Measure:
    measure = Measure.of(config)
    assert measure is not None
    return measure


def new_keeper(problem: ImitationProblem) -> Keeper:
    config = problem.config
    return Keeper(config, problem, measure_of(config), Journal(config.run.path / "metrics.jsonl"))


def record(problem: ImitationProblem) -> Best:
    best = read_best(problem.config.run.path / KEPT_DIRECTORY)
    assert best is not None
    return best


def kept_weights(problem: ImitationProblem) -> dict[str, Tensor]:
    (file,) = (problem.config.run.path / KEPT_DIRECTORY).glob("*.safetensors")
    assert file.name == record(problem).file
    return load_file(file)


def student(problem: ImitationProblem, scale: float) -> dict[str, Tensor]:
    """Weights that are the further from the teacher's the larger `scale` is."""
    return perturbed(problem.new_student(), scale=scale).state_dict()


def test_a_student_is_measured_on_noise_that_the_final_table_has_not(problem: ImitationProblem) -> None:
    network = perturbed(problem.new_student()).eval()
    generators = seeded([problem.config.evaluation.seed + SEED_OFFSET + row for row in range(5)])
    noise = draw_noise(generators, problem.teacher.latent_shape, CPU)
    prompts = problem.prompts()
    told = problem.encoder.encode([prompts[index % len(prompts)] for index in range(995, 1000)])
    scale = torch.full((5,), problem.config.evaluation_guidance_scale)
    wanted = paired_trajectory_error(
        sample_student(problem.student_policy(network), noise, told, scale, num_steps=4),
        sample_teacher(problem.teacher_policy(problem.teacher_grid(8)), noise, told, scale),
    )
    held_out = HeldOut(problem.config, problem, measure_of(problem.config))
    assert held_out.value(network) == pytest.approx(wanted, rel=1e-5)
    assert held_out.value(network) == held_out.value(network)


def test_a_better_student_takes_the_place_of_the_best_and_a_worse_one_does_not(problem: ImitationProblem) -> None:
    keeper = new_keeper(problem)
    weights = {update: student(problem, scale) for update, scale in ((1, 0.02), (2, 0.01), (3, 0.05))}
    for update, state in weights.items():
        keeper.judge(state, update=update)
    lines = [line for line in read_journal(problem.config.run.path / "metrics.jsonl") if line["kind"] == "held_out"]
    values = [line["value"] for line in lines]
    assert values[1] < values[0] < values[2]
    assert [line["best_update"] for line in lines] == [1, 2, 2]
    best = record(problem)
    assert (best.update, best.value, best.last_update, best.last_value) == (2, values[1], 3, values[2])
    assert best.ahead == pytest.approx(values[2] - values[1])
    assert all(torch.equal(tensor, weights[2][name]) for name, tensor in kept_weights(problem).items())


def test_the_best_survives_a_restart(problem: ImitationProblem) -> None:
    new_keeper(problem).judge(student(problem, 0.01), update=4)
    again = new_keeper(problem)
    again.judge(student(problem, 0.05), update=2)  # the restart went back behind the best
    assert (record(problem).update, record(problem).last_update) == (4, 2)
    again.judge(student(problem, 0.0), update=3)
    assert (record(problem).update, record(problem).last_update) == (3, 3)
    assert len(kept_weights(problem)) == len(student(problem, 0.0))


def test_a_best_of_another_measure_or_a_damaged_one_is_sought_anew(
    problem: ImitationProblem, caplog: pytest.LogCaptureFixture
) -> None:
    new_keeper(problem).judge(student(problem, 0.0), update=1)
    changed = load_config(None, [f"run.directory={problem.config.run.directory}", "run.name=tiny",
                                 f"data.path={problem.config.data.path}", "teacher.steps=8",
                                 f"teacher.pipeline={problem.config.teacher.pipeline}",
                                 "learner.keep_best={every: 1, images: 4}"])  # fmt: skip
    other = ImitationProblem.create(changed, CPU)
    new_keeper(other).judge(student(other, 0.05), update=2)
    assert record(other).update == 2, "its value does not compare with the first's"
    file = problem.config.run.path / KEPT_DIRECTORY / record(other).file
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    new_keeper(other).judge(student(other, 0.06), update=3)
    assert record(other).update == 3
    told = [entry.getMessage() for entry in caplog.records if entry.name == "learner.keeper"]
    assert "was chosen by paired_trajectory_error of 5 images" in told[0]
    assert "of update 2, is damaged" in told[1]


def test_a_student_that_gives_no_number_is_never_the_best(problem: ImitationProblem) -> None:
    keeper = new_keeper(problem)
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in student(problem, 0.0).items()}
    keeper.judge(broken, update=1)
    assert read_best(problem.config.run.path / KEPT_DIRECTORY) is None
    keeper.judge(student(problem, 0.1), update=2)
    keeper.judge(broken, update=3)
    assert (record(problem).update, record(problem).last_update, record(problem).last_value) == (2, 3, None)
    assert record(problem).ahead is None


def test_a_device_without_room_costs_a_measurement_and_not_the_run(
    problem: ImitationProblem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(*arguments: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    keeper = new_keeper(problem)
    keeper.judge(student(problem, 0.05), update=1)
    with monkeypatch.context() as patched:
        patched.setattr(HeldOut, "value", out_of_memory)
        keeper.judge(student(problem, 0.0), update=2)
    assert "update 2: the device has too little memory to measure the student (CUDA out of memory" in caplog.text
    assert (record(problem).update, record(problem).last_update) == (1, 1)
    keeper.judge(student(problem, 0.0), update=3)
    assert record(problem).update == 3


def test_a_full_disk_costs_the_best_and_not_the_run(
    problem: ImitationProblem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = new_keeper(problem)
    keeper.judge(student(problem, 0.05), update=1)

    def full(path: Path, *arguments: Any) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(keeper_module, "write_tensors", full)
        keeper.judge(student(problem, 0.0), update=2)
    assert "No space left on device" in caplog.text
    assert sorted(path.name for path in (problem.config.run.path / KEPT_DIRECTORY).iterdir()) == [
        "best.json",
        record(problem).file,
    ]
    keeper.judge(student(problem, 0.01), update=3)
    assert record(problem).update == 3


def test_measuring_changes_nothing_that_is_trained(tiny_overrides: list[str]) -> None:
    digests = []
    for name, more in (("with", [KEEP]), ("without", [])):
        config = load_config(None, [*tiny_overrides, f"run.name={name}", "learner.sample_every=0", *more])
        assert run_inline(config)
        manifest = json.loads((config.run.path / "checkpoints" / "update_00000006" / "manifest.json").read_text())
        digests.append([manifest["files"][file]["digest"] for file in ("student.safetensors", "worker_0.safetensors")])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert digests[0] == digests[1]
    assert not (config.run.path / KEPT_DIRECTORY).exists()


class Recorder:
    """Wants every second update's student."""

    def __init__(self) -> None:
        self.judged: dict[int, dict[str, Tensor]] = {}

    def wants(self, update: int) -> bool:
        return update > 0 and update % 2 == 0 and update not in self.judged

    def judge(self, weights: Any, *, update: int) -> None:
        self.judged[update] = {name: tensor.clone() for name, tensor in weights.items()}


def test_the_trainer_has_the_students_judged_that_it_would_export(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(tmp_path, config=learner_config(updates=4, checkpoint_every=2), keeper=recorder)
    assert trainer.run()
    assert list(recorder.judged) == [2, 4]
    for update, weights in recorder.judged.items():
        exported = load_file(tmp_path / "checkpoints" / f"update_{update:08d}" / "average.safetensors")
        assert all(torch.equal(weights[name], tensor) for name, tensor in exported.items())


def test_only_due_updates_are_measured_and_the_last(tiny_overrides: list[str]) -> None:
    config = load_config(None, [*tiny_overrides, "learner.updates=5", "learner.keep_best={every: 2, images: 2}"])
    keeper = new_keeper(ImitationProblem.create(config, CPU))
    assert [update for update in range(6) if keeper.wants(update)] == [2, 4, 5]


@pytest.mark.parametrize("metric", ["fid", "clip_score", "agreement", "coverage"])
def test_a_metric_that_is_not_at_hand_is_refused(tiny_overrides: list[str], tiny_directory: Path, metric: str) -> None:
    """By the configuration, and where the pipeline's pictures are of another size, once that is known."""
    key, remedy = r"learner\.keep_best\.metric: ", r"set learner\.keep_best\.metric=paired_trajectory_error"
    keep = f"learner.keep_best.metric={metric}"
    with pytest.raises(ConfigError, match=f"{key}.*{metric} needs networks .* data.path is .*{remedy}"):
        load_config(None, [*tiny_overrides, keep])
    config = load_config(None, [*tiny_overrides, keep, "data.path=builtin"])
    problem = ImitationProblem.create(config, CPU)
    with pytest.raises(ConfigError, match=f"{key}{metric} needs .* not at hand for images of 16 pixels; {remedy}"):
        new_keeper(problem)


@pytest.mark.parametrize(("metric", "better"), [("fid", "lower"), ("agreement", "higher")])
def test_the_built_in_networks_choose_the_better_pictures(tmp_path: Path, metric: str, better: str) -> None:
    config = load_config(None, [f"run.directory={tmp_path}", f"learner.keep_best={{metric: {metric}, images: 40}}"])
    problem = ImitationProblem.create(config, CPU)
    students = {update: student(problem, scale) for update, scale in ((1, 0.1), (2, 0.0), (3, 0.2))}
    before = encode_state(random_state())
    keeper = new_keeper(problem)
    for update, weights in students.items():
        keeper.judge(weights, update=update)
    after = encode_state(random_state())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "training would notice"
    values = [line["value"] for line in read_journal(config.run.path / "metrics.jsonl")]
    assert record(problem).update == 2
    assert values[1] == (min(values) if better == "lower" else max(values))
