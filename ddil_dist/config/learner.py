"""The learner: its workers, batches, optimizers, and what it leaves as it trains."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ddil_dist.section import LabelSelector, Positive, PositiveFloat, PositiveSeconds, Probability, Section, UnquotedNo


class OptimizerConfig(Section):
    """AdamW, its learning-rate schedule, and gradient clipping."""

    type: Literal["adamw", "adamw_fused", "adamw_8bit"] = Field(
        "adamw", description="adamw_fused: one kernel a step; adamw_8bit: moments in 8 bits, needs bitsandbytes"
    )
    learning_rate: PositiveFloat = Field(5e-4, description="after the warm-up")
    betas: tuple[Probability, Probability] = Field((0.9, 0.999), description="decay of the two moments")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="decoupled, as AdamW's")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="decay to 0 after the warm-up")
    warmup_updates: Annotated[int, Field(ge=0)] = Field(20, description="in which the rate rises from 0")
    restarts: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (), description="shares of the run's updates at which warm-up and decay begin anew, each over its own span"
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")

    @field_validator("restarts")
    @classmethod
    def _restarts_rise(cls, restarts: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in itertools.pairwise(restarts)):
            raise ValueError(f"is {list(restarts)}, but must rise strictly; put the shares in order, each once")
        return restarts


class KeepBestConfig(Section):
    """The best student by a held-out metric, kept beside the last."""

    metric: Literal["paired_trajectory_error", "fid", "clip_score", "agreement", "coverage"] = Field(
        "paired_trajectory_error",
        description="decides. All but the first, the distance from the teacher's own samples, need networks, which "
        "ship for the built-in data; distribution matching follows no trajectory, so choose another for it",
    )
    every: Positive = Field(100, description="updates between measurements, during which training waits")
    images: Annotated[int, Field(ge=2, le=1000)] = Field(
        64, description="of a measurement, from noise that neither training nor the final table draws from"
    )


class LearnerConfig(Section):
    """The learner workers: how many updates of what, published and saved how often."""

    updates: Positive = Field(1000, description="of the whole run")
    batch_size: Positive = Field(64, description="states of one update over all workers")
    micro_batch_size: Positive | None = Field(None, description="states of one backward pass; None: no accumulation")
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(),
        description="of the student, and of further networks where `optimizers` does not say otherwise",
    )
    optimizers: dict[str, OptimizerConfig] = Field(
        default_factory=dict,
        description="of further roles, such as fake_score; what is not said of one is as in `optimizer`",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.98, description="of the exported student's weight average; 0 exports the last weights"
    )
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], UnquotedNo] = Field(
        "no", description="of the networks in training"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass, for less memory"
    )
    compile: Annotated[Literal["no", "default", "max-autotune-no-cudagraphs"], UnquotedNo] = Field(
        "no",
        description="torch.compile's mode for the networks in training. The first updates take minutes, and where "
        "micro-batches differ in size a resumed run is equal to rounding, not bit for bit",
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp: workers on GPUs share weights, gradients and optimizers among them (FSDP2)"
    )
    workers: Positive = Field(1, description="of the learner, which share each batch")
    min_workers: Positive | None = Field(
        None, description="elastic: go on with as few as this while nodes are lost; None: as many as workers or none"
    )
    num_cpus: Annotated[float, Field(ge=0)] = Field(1.0, description="CPUs that a worker is lent by Ray")
    num_gpus: Annotated[float, Field(ge=0)] = Field(
        0.0, description="GPUs that a worker is lent by Ray; a share, such as 0.5, shares one"
    )
    resources: dict[str, PositiveFloat] = Field(default_factory=dict, description="custom Ray resources per worker")
    label_selector: LabelSelector = Field(default_factory=dict, description="nodes that workers may run on, by label")
    threads: Positive = Field(1, description="CPU threads of one worker")
    publish_every: Positive = Field(20, description="updates between published weights versions")
    checkpoint_every: Positive = Field(100, description="updates between checkpoints")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints that are kept")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="restarts of the workers in a row without a new checkpoint; more end the run"
    )
    sample_timeout_s: PositiveSeconds = Field(300.0, description="for the replay buffer to give a batch's states")
    start_timeout_s: PositiveSeconds = Field(1800.0, description="for the workers to find their places and begin")
    prefetch: Annotated[int, Field(ge=1, le=2)] = Field(
        1, description="batches drawn ahead while an update runs; runs in one process draw none, to be repeatable"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "comet_ml", "mlflow", "aim", "dvclive", "swanlab"], ...] = Field(
        ("tensorboard",), description="besides metrics.jsonl; those that know a service stay offline unless told"
    )
    sample_every: Annotated[int, Field(ge=0)] = Field(
        200, description="updates between pictures of samples from fixed noise in progress/; 0: none"
    )
    keep_best: KeepBestConfig | None = Field(
        None,
        description="measure the student as it trains, and export the best to student_best/ too; {}: by its defaults; "
        "None: no, as it holds up training and takes the room of another student",
    )

    @model_validator(mode="before")
    @classmethod
    def _further_optimizers_are_as_the_students(cls, raw: Any) -> Any:
        """What is not said of a further role's optimizer is as `optimizer` has it."""
        if not isinstance(raw, dict):
            return raw
        own, further = raw.get("optimizer"), raw.get("optimizers")
        if not isinstance(own, dict) or not isinstance(further, dict):
            return raw
        merged = {role: {**own, **said} if isinstance(said, dict) else said for role, said in further.items()}
        return {**raw, "optimizers": merged}

    @model_validator(mode="after")
    def _range_of_workers(self) -> LearnerConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must not exceed workers ({self.workers})")
        return self

    @property
    def worker_batch_size(self) -> int:
        """States of one worker's share of an update, rounded up where an elastic run has lost workers."""
        return -(-self.batch_size // self.workers)

    def with_workers(self, num: int) -> LearnerConfig:
        """The section while `num` workers are there."""
        return self.model_copy(update={"workers": num})

    def optimizer_of(self, role: str) -> OptimizerConfig:
        """The optimizer of a role's network."""
        return self.optimizer if role == "student" else self.optimizers.get(role, self.optimizer)

    @model_validator(mode="after")
    def _batches_divide(self) -> LearnerConfig:
        per_worker, rest = divmod(self.batch_size, self.workers)
        if rest:
            raise ValueError(
                f"batch_size: {self.batch_size} states do not divide among learner.workers = {self.workers}; choose a "
                "multiple"
            )
        if self.micro_batch_size is not None and per_worker % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} does not divide the {per_worker} states of a worker's "
                "share of learner.batch_size; choose a divisor"
            )
        return self
