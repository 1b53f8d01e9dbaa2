"""The rollout actors: how many, where, and how they compute."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ddil_dist.section import LabelSelector, Positive, PositiveFloat, PositiveSeconds, Precision, Section, UnquotedNo


class AutoscaleConfig(Section):
    """How many rollout actors there may be when the fleet follows the learner's demand by itself."""

    min: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="fewest rollout actors")
    max: Annotated[int, Field(ge=1, le=4096)] = Field(8, description="most rollout actors")
    learner_wait: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.02, description="share of the learner's time that may go into waiting for states"
    )
    window_s: PositiveSeconds = Field(15.0, description="between two looks at who waits")

    @model_validator(mode="after")
    def _ordered(self) -> AutoscaleConfig:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self


class RolloutConfig(Section):
    """The rollout actors and their engine."""

    actors: Annotated[int, Field(ge=0, le=4096)] = Field(
        1, description="wanted number; 0 pauses; python -m ddil_dist.scale changes it on a running run"
    )
    autoscale: AutoscaleConfig | None = Field(None, description="follow the learner's demand; None: as many as wanted")
    batch_size: Positive = Field(64, description="samples of one teacher call of the engine")
    student_batch_size: Positive | None = Field(
        None, description="samples of one student call; None: a quarter of batch_size with labels by actors, else all"
    )
    insert_batch: Positive = Field(64, description="states of one insert")
    labels: Literal["actors", "learner"] = Field(
        "actors", description="who asks the teacher at a state: actors insert its answer with the state"
    )
    num_cpus: Annotated[float, Field(ge=0)] = Field(1.0, description="CPUs that an actor is lent by Ray")
    num_gpus: Annotated[float, Field(ge=0)] = Field(
        0.0, description="GPUs that an actor is lent by Ray; a share, such as 0.5, shares one"
    )
    resources: dict[str, PositiveFloat] = Field(default_factory=dict, description="custom Ray resources per actor")
    label_selector: LabelSelector = Field(default_factory=dict, description="nodes that actors may run on, by label")
    threads: Positive = Field(1, description="CPU threads of one actor's network calls")
    precision: Precision = Field("float32", description="the student's network runs in this")
    insert_timeout_s: PositiveSeconds = Field(600.0, description="for the replay buffer to take an insert")
    channels_last: bool = Field(False, description="keep the networks' weights in channels-last order")
    compile: Annotated[Literal["no", "default", "reduce-overhead"], UnquotedNo] = Field(
        "no",
        description="torch.compile's mode for the networks; reduce-overhead: CUDA graphs. The first calls take minutes",
    )
    until_timestep: Annotated[int, Field(ge=0)] = Field(
        0, description="rollouts end at the first grid point at or below this timestep; 0: at the grid's last"
    )
    record: Literal["all", "last"] = Field(
        "all", description="which states of a rollout are inserted: every one that it stops at, or where it ends"
    )
    silent_timeout_s: PositiveSeconds = Field(
        900.0, description="an actor without a sign of life for this long is replaced; loading its networks included"
    )

    @property
    def student_rows(self) -> int:
        """Samples of one student call."""
        if self.student_batch_size is not None:
            return self.student_batch_size
        return self.batch_size if self.labels == "learner" else max(1, self.batch_size // 4)
