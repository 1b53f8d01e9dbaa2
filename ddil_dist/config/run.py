"""A whole run's configuration: its sections, and the rules between them."""

from __future__ import annotations

import functools
import operator
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ddil_dist.config.curriculum import CurriculumConfig
from ddil_dist.config.data import BUILTIN, DataConfig
from ddil_dist.config.deadlines import Deadlines
from ddil_dist.config.evaluation import EvaluationConfig
from ddil_dist.config.learner import LearnerConfig
from ddil_dist.config.priors import PriorConfig
from ddil_dist.config.replay import RedisConfig, ReplayConfig
from ddil_dist.config.rollout import RolloutConfig
from ddil_dist.config.student import StudentConfig
from ddil_dist.config.teacher import TeacherConfig
from ddil_dist.config.thresholding import NoThresholding, Thresholding
from ddil_dist.methods import METHODS, GridPlan, Method, Progressive
from ddil_dist.section import Section

USUAL_GUIDANCE_SCALE = 1.5
"""Of evaluation, where the configuration names none."""


class RunSection(Section):
    """What the run is called, where it leaves its files, and how its processes are arranged."""

    name: str = Field("demo", description="names the directory, the replay keys and the Ray actors of the run")
    directory: Path = Field(Path("runs"), description="parent of the run's directory; shared storage on a cluster")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of every random draw in the run")
    execution: Literal["ray", "inline"] = Field("ray", description="inline: one process, no Ray, no Redis")

    @field_validator("name")
    @classmethod
    def _name_is_a_plain_word(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise ValueError("must be 1 to 64 letters, digits, '-' or '_', beginning with a letter or digit")
        return name

    @property
    def path(self) -> Path:
        return self.directory / self.name


if TYPE_CHECKING:
    Objective = Method
else:
    Objective = Annotated[functools.reduce(operator.or_, METHODS), Field(discriminator="type")]


class RunConfig(Section):
    """A whole run. Sections have defaults; cross-section rules are checked here."""

    run: RunSection = RunSection()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    thresholding: Thresholding = NoThresholding()
    objective: Objective = Progressive()
    prior: PriorConfig = PriorConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    replay: ReplayConfig = ReplayConfig()
    redis: RedisConfig = RedisConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deadlines: Deadlines = Deadlines()
    curriculum: CurriculumConfig | None = Field(None, description="the run as a sequence of runs; None: a single one")

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        self.objective.check(self)
        self._check_roles()
        self._check_sharding()
        self._check_batches()
        self._check_evaluation()
        self._check_execution()
        return self

    def _check_execution(self) -> None:
        """One process has one device and no peers: what asks for more would be passed over in silence."""
        if self.run.execution != "inline":
            return
        asked = {
            "learner.workers": (self.learner.workers, 1),
            "learner.num_gpus": (self.learner.num_gpus, 0),
            "rollout.num_gpus": (self.rollout.num_gpus, 0),
            "redis.url": (self.redis.url, None),
        }
        for key, (value, alone) in asked.items():
            if value != alone:
                shown = "a server" if key == "redis.url" else f"{value:g}"
                raise ValueError(
                    f"{key}: {shown}, but run.execution=inline runs everything in one process, on the GPU if there is "
                    f"one, without Ray and Redis; set {key}={'null' if alone is None else alone}, or run.execution=ray"
                )

    def _check_roles(self) -> None:
        """Of learner.optimizers: only networks that the method trains besides the student."""
        roles = self.objective.roles
        for role in self.learner.optimizers.keys() - set(roles):
            remedy = f"name one of {sorted(roles)}" if roles else "remove it"
            if role == "student":
                remedy = "the student's is learner.optimizer"
            raise ValueError(
                f"learner.optimizers: {role!r} is no further network that '{self.objective.type}' trains; {remedy}"
            )

    def _check_sharding(self) -> None:
        if self.student.lora is not None and self.learner.sharding == "fsdp":
            raise ValueError(
                "learner.sharding: 'fsdp' cannot share an adapter (student.lora), whose frozen base every worker keeps "
                "whole, so nothing would be trained; set learner.sharding=none"
            )

    def _check_batches(self) -> None:
        least = self.learner.batch_size * 2
        if self.replay.error_buffer < least:
            raise ValueError(
                f"replay.error_buffer: {self.replay.error_buffer:g} is under two batches ({least}): inserts and "
                "samples would wait for each other; raise it"
            )
        inserted = self.rollout.insert_batch * self.replay.samples_per_insert
        if inserted > 2 * self.replay.error_buffer:
            raise ValueError(
                f"replay.error_buffer: {self.replay.error_buffer:g} is under half of one insert's worth of samples "
                f"(rollout.insert_batch x replay.samples_per_insert = {inserted:g}): no insert could ever be admitted; "
                "raise it"
            )

    def _check_evaluation(self) -> None:
        keep = self.learner.keep_best
        if keep is not None and keep.metric != "paired_trajectory_error" and self.data.path != BUILTIN:
            raise ValueError(
                f"learner.keep_best.metric: {keep.metric} needs networks that ship for the built-in data alone, and "
                f"data.path is {self.data.path!r}; set learner.keep_best.metric=paired_trajectory_error, which needs "
                "none"
            )
        scale, trained = self.evaluation.guidance_scale, self.teacher.guidance
        if scale is not None and not trained.min <= scale <= trained.max:
            raise ValueError(
                f"evaluation.guidance_scale: {scale:g} is outside teacher.guidance, {trained.min:g} to "
                f"{trained.max:g}, which is all that the student is trained for; choose one within, set it to null, or "
                "widen teacher.guidance"
            )

    @property
    def evaluation_guidance_scale(self) -> float:
        """Where the student is measured, shown, and its export verified: always a scale that it was trained on."""
        if self.evaluation.guidance_scale is not None:
            return self.evaluation.guidance_scale
        return min(max(USUAL_GUIDANCE_SCALE, self.teacher.guidance.min), self.teacher.guidance.max)

    @property
    def needs_data(self) -> bool:
        """Whether captioned images are needed: forward states, a discriminator's, or captions to roll out from."""
        return self.prior.uses_forward or self.objective.uses_images or self.data.prompts is None

    @property
    def grid(self) -> GridPlan:
        """The grid that training states live on, as the method has it."""
        return self.objective.grid(self)
