"""A curriculum: one run as a sequence of ordinary runs, each beginning where the last one ended.

Progressive distillation halves the steps stage by stage, 32 -> 16 -> 8 -> 4 -> 2. A stage is what it changes of the
run's configuration; all else it has from there. It leaves its checkpoints and a loadable pipeline as any run does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ddil_dist.section import Section

STUDENT_DIRECTORY = "student"
"""Where, in its directory, a finished run leaves its pipeline."""
BEST_DIRECTORY = "student_best"
"""Where it leaves that of its best student, where it kept one."""


class CurriculumConfig(Section):
    """Stages, in order. The second's student, and by choice its teacher, is the first's result, and so on."""

    teacher: Literal["student", "original"] = Field(
        "student",
        description="of a stage: the last one's student, in its own steps; or teacher.pipeline throughout, in "
        "teacher.steps",
    )
    stages: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)] = Field(
        description="what each stage changes of this configuration, such as {student: {steps: 16}}"
    )


def stage_mappings(raw: Mapping[str, Any], curriculum: CurriculumConfig) -> list[dict[str, Any]]:
    """The configuration of every stage as plain data, from that of the run, dumped.

    Stage 1 of the run NAME is the run NAME_stage_1 in NAME's directory.
    """
    stages: list[dict[str, Any]] = []
    parent = Path(raw["run"]["directory"]) / raw["run"]["name"]
    for number, changes in enumerate(curriculum.stages, start=1):
        stage = merged({**raw, "curriculum": None}, _inherited(stages, curriculum))
        stage = merged(stage, changes)
        named = {"name": f"{raw['run']['name']}_stage_{number}", "directory": str(parent)}
        stages.append(merged(stage, {"run": named}))
    return stages


def _inherited(stages: list[dict[str, Any]], curriculum: CurriculumConfig) -> dict[str, Any]:
    """What the next stage takes over from the last of `stages`."""
    if not stages:
        return {}
    run, steps = stages[-1]["run"], stages[-1]["student"]["steps"]
    result = str(Path(run["directory"]) / run["name"] / STUDENT_DIRECTORY)
    inherited: dict[str, Any] = {"student": {"initial": result}}
    if curriculum.teacher == "student":
        inherited["teacher"] = {"pipeline": result, "revision": None, "variant": None, "steps": steps}
    return inherited


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, sections merged key by key; one of another `type` replaces what was there."""
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        if not isinstance(before, Mapping) or not isinstance(value, Mapping):
            result[key] = value
        elif value.get("type", before.get("type")) == before.get("type"):
            result[key] = merged(before, value)
        else:
            result[key] = value
    return result
