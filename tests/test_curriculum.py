"""A curriculum resolves into ordinary runs, each of which begins with what the last one left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddil_dist.config import RunConfig, dump_config, load_config, resolve_stages
from ddil_dist.config.curriculum import merged
from ddil_dist.errors import ConfigError
from ddil_dist.launch.stages import run_stages
from ddil_dist.methods import Velocity
from ddil_dist.status import ask_to_stop

FILE = """
run: {name: long, directory: /runs, seed: 7}
teacher: {steps: 32, guidance: {min: 2, max: 9}}
student: {steps: 4}
thresholding: {type: reflect, limit: 3}
learner: {updates: 100, batch_size: 32, optimizer: {warmup_updates: 5}}
replay: {error_buffer: 1024}
curriculum:
  stages:
    - {objective: {type: velocity}, student: {steps: 32}, learner: {updates: 40}}
    - {student: {steps: 16}}
    - {student: {steps: 8}, learner: {optimizer: {warmup_updates: 9}}}
    - student: {steps: 4}
      learner: {updates: 140}
      prior:
        parts:
          - {until: 0.25, forward: 0.5, student: 0.1, teacher: 0.4}
          - {until: 1, forward: 0.25, student: 0.6, teacher: 0.15}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(FILE)
    return tmp_path / "c.yaml"


def column(stages: list[RunConfig], *path: str) -> list[Any]:
    values: list[Any] = []
    for stage in stages:
        value: Any = stage
        for name in path:
            value = getattr(value, name)
        values.append(value)
    return values


def test_each_stage_begins_with_the_students_of_the_last(file: Path) -> None:
    stages = resolve_stages(load_config(file))
    results = [f"/runs/long/long_stage_{number}/student" for number in (1, 2, 3)]
    assert column(stages, "run", "path") == [Path(f"/runs/long/long_stage_{number}") for number in (1, 2, 3, 4)]
    assert column(stages, "student", "initial") == [None, *results]
    assert column(stages, "teacher", "pipeline") == ["builtin", *results]
    assert column(stages, "teacher", "steps") == [32, 32, 16, 8]
    assert column(stages, "student", "steps") == [32, 16, 8, 4]
    assert [stage.grid.substeps for stage in stages] == [1, 2, 2, 2]
    assert column(stages, "curriculum") == [None] * 4


def test_the_original_teacher_takes_more_substeps(file: Path) -> None:
    stages = resolve_stages(load_config(file, ["curriculum.teacher=original"]))
    assert column(stages, "teacher", "pipeline") == ["builtin"] * 4
    assert [stage.grid.substeps for stage in stages] == [1, 2, 4, 8]
    assert column(stages, "student", "initial")[1] == "/runs/long/long_stage_1/student"


def test_a_stage_changes_what_it_names_and_has_the_rest_from_the_run(file: Path) -> None:
    config = load_config(file)
    stages = resolve_stages(config)
    assert column(stages, "learner", "updates") == [40, 100, 100, 140]
    assert column(stages, "learner", "optimizer", "warmup_updates") == [5, 5, 9, 5]
    assert column(stages, "objective", "type") == ["velocity", "progressive", "progressive", "progressive"]
    assert stages[0].objective == Velocity()
    assert column(stages, "prior")[:3] == [config.prior] * 3
    assert [part.until for part in stages[3].prior.parts] == [0.25, 1]
    for section in ("thresholding", "data", "rollout", "replay", "redis"):
        assert column(stages, section) == [getattr(config, section)] * 4
    assert column(stages, "teacher", "guidance") == [config.teacher.guidance] * 4
    assert column(stages, "run", "seed") == [7] * 4


def test_a_run_without_stages_is_its_own_single_stage() -> None:
    config = RunConfig()
    assert resolve_stages(config) == [config]


def test_a_curriculum_and_its_stages_round_trip(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    for number, each in enumerate([config, *resolve_stages(config)]):
        (tmp_path / f"{number}.yaml").write_text(dump_config(each), encoding="utf-8")
        assert load_config(tmp_path / f"{number}.yaml") == each


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            "[{student: {steps: 16}}, {learner: {updtes: 3}}]",
            "curriculum.stages.1: learner.updtes: unknown key (value 3); did you mean learner.updates?",
        ),
        (
            "[{student: {steps: 12}}]",
            "curriculum.stages.0: teacher.steps: 32 is not a multiple of student.steps (12)",
        ),
        (
            "[{student: {steps: 8}}, {student: {steps: 16}}]",
            "curriculum.stages.1: teacher.steps: 8 is not a multiple of student.steps (16)",
        ),
        ("[]", "curriculum.stages: Tuple should have at least 1 item"),
        ("[3]", "curriculum.stages.0: Input should be a valid dictionary"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_by_its_place(stages: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"curriculum.stages={stages}"])
    assert str(caught.value).startswith(message)


def test_every_problem_of_every_stage_has_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["curriculum.stages=[{lerner: {}}, {student: {steps: 0}, run: {seed: -1}}]"])
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        "curriculum.stages.0",
        "curriculum.stages.1",
        "curriculum.stages.1",
    ]


def test_merging_replaces_a_section_of_another_type() -> None:
    base = {"a": {"type": "x", "k": 1, "deep": {"m": 1, "n": 2}}, "b": [1, 2], "c": 3}
    assert merged(base, {"a": {"deep": {"n": 5}}}) == {**base, "a": {"type": "x", "k": 1, "deep": {"m": 1, "n": 5}}}
    assert merged(base, {"a": {"type": "y"}, "b": [3]}) == {"a": {"type": "y"}, "b": [3], "c": 3}
    assert base["b"] == [1, 2]


@pytest.mark.parametrize("kept", [False, True])
def test_the_run_s_students_are_the_last_stage_s(file: Path, tmp_path: Path, kept: bool) -> None:
    config = load_config(file, [f"run.directory={tmp_path}"])

    def run(stage: RunConfig) -> int:
        for name in ("student", *(["student_best"] if kept else [])):
            (stage.run.path / name).mkdir()
            (stage.run.path / name / "whose").write_text(stage.run.name)
        return 0

    assert run_stages(config, resolve_stages(config), run) == 0
    found = {path.parent.name: path.read_text() for path in (tmp_path / "long").glob("student*/whose")}
    assert found == dict.fromkeys(("student", *(["student_best"] if kept else [])), "long_stage_4")


@pytest.mark.parametrize("whose", ["the stage", "the run"])
def test_a_request_to_stop_that_a_stage_s_end_outruns_stops_the_curriculum(
    file: Path, tmp_path: Path, whose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(file, [f"run.directory={tmp_path}"])
    begun: list[str] = []

    def run(stage: RunConfig) -> int:
        begun.append(stage.run.name)
        ask_to_stop(stage.run.path if whose == "the stage" else config.run.path)
        return 0

    assert run_stages(config, resolve_stages(config), run) == 130
    assert begun == ["long_stage_1"]
    assert "stopped after stage 1 of 4" in capsys.readouterr().out
