"""Every section of a run's configuration: keys, ranges, defaults, and the rules between them."""

from __future__ import annotations

import functools
import itertools
import operator
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlparse

from PIL import ImageColor
from pydantic import Field, field_validator, model_validator

from ddil_dist.config.curriculum import CurriculumConfig
from ddil_dist.config.priors import PriorConfig
from ddil_dist.config.student import StudentConfig
from ddil_dist.config.thresholding import NoThresholding, Thresholding
from ddil_dist.methods import METHODS, GridPlan, Method, Progressive
from ddil_dist.section import (
    Positive,
    PositiveFloat,
    PositiveSeconds,
    Precision,
    Probability,
    Section,
    UnquotedNo,
)

BUILTIN = "builtin"
"""Name of the pipeline, data set and prompts that ship with the package."""

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


class GuidanceRange(Section):
    """Guidance scales w of x_uncond + w (x_cond - x_uncond) that training covers, drawn uniformly."""

    min: Annotated[float, Field(ge=1)] = Field(1.0, description="the lowest scale; 1 means none")
    max: Annotated[float, Field(ge=1)] = Field(
        8.0, description="the highest scale; equal to min: the student knows that one alone"
    )

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceRange:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self

    @property
    def single(self) -> float | None:
        """The one scale that there is; None where there are many."""
        return self.min if self.min == self.max else None


class TeacherConfig(Section):
    """The expert: any Stable Diffusion pipeline in diffusers' format, sampled in many guided DDIM steps."""

    pipeline: str = Field(BUILTIN, description="'builtin', a pipeline directory, or a hub id")
    revision: str | None = Field(None, description="hub revision")
    variant: str | None = Field(None, description="weights variant of the files, such as fp16")
    steps: Annotated[int, Field(ge=1, le=500)] = Field(
        32, description="teacher steps of a whole trajectory; a multiple of student.steps"
    )
    precision: Precision = Field("float32", description="the frozen network runs in this")
    guidance: GuidanceRange = Field(GuidanceRange(), description="scales that training covers")


class DataConfig(Section):
    """Image-text data for forward diffusion, and the prompts of rollouts."""

    path: str = Field(
        BUILTIN,
        description="'builtin', a file, a directory, a data set's id on the hub (owner/name), a pattern as "
        "/data/{00000..01210}.tar or /data/*.parquet, an address (s3://, gs://, https://), or pipe:COMMAND",
    )
    format: Literal["auto", "parquet", "arrow", "webdataset", "folder"] = Field(
        "auto", description="of `path`; auto: by its files' names"
    )
    cache: Path | None = Field(None, description="directory that `python -m ddil_dist.cache` made of this data")
    split: str = Field("train", description="of a data set on the hub, or of several saved together")
    image_column: str = Field("image", description="holds the images")
    text_column: str = Field("text", description="holds the captions")
    window: Positive | None = Field(
        None,
        description="shards or Parquet files that are held at a time: the data is read in sequence, its files in a "
        "seeded order and rows shuffled among so many, and what lies elsewhere is fetched when it is needed; None: all "
        "is fetched first, and read at random",
    )
    download: Path | None = Field(
        None, description="directory that data at an address is fetched into: once, or a window at a time"
    )
    fetch_timeout_s: PositiveSeconds = Field(3600.0, description="for one file that is fetched")
    pipe: bool = Field(False, description="run the commands of a path pipe:COMMAND, which print a shard each")
    background: str = Field("white", description="colour under what is transparent: a name that CSS has, or #rrggbb")
    prompts: Path | None = Field(None, description="a text file, one rollout prompt a line; None: the data's texts")

    @model_validator(mode="after")
    def _a_cache_is_read_at_random(self) -> DataConfig:
        if self.window is not None and self.cache is not None:
            raise ValueError("window: data.cache holds all of the data, and is read at random; set one of them to null")
        return self

    @field_validator("background")
    @classmethod
    def _a_colour(cls, value: str) -> str:
        ImageColor.getrgb(value)  # raises ValueError
        return value


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


LabelSelector = dict[str, str]
"""Ray's label selector: label to value, or to "!value", "in(a, b)", "!in(a, b)"; nodes get theirs by `ray start
--labels`."""


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


class ReplayConfig(Section):
    """The aggregated replay buffer: its bounds, and the balance of inserts and samples."""

    capacity: Annotated[int, Field(gt=0, lt=2**32)] = Field(100_000, description="states kept")
    capacity_bytes: Positive = Field(2 * 2**30, description="bytes of records kept")
    removal: Literal["oldest", "reservoir"] = Field(
        "oldest", description="oldest: they go first; reservoir: every state ever inserted is kept with equal chance"
    )
    min_size: Positive = Field(256, description="states that must be live before the first sample")
    samples_per_insert: PositiveFloat = Field(8.0, description="how often a state is sampled on average")
    error_buffer: PositiveFloat = Field(
        2048.0, description="how far samples and inserts may run from that ratio before one waits"
    )
    max_staleness: Positive | None = Field(None, description="student updates after which a state is not sampled")
    latent_dtype: Precision = Field(
        "float32", description="of the latents kept; float16 halves the buffer and its traffic at no error that shows"
    )


class RedisConfig(Section):
    """The replay server. Without a URL the run starts a server of its own on the loopback."""

    url: str | None = Field(None, repr=False, description="redis:// or rediss://; None: embedded")
    more_urls: tuple[str, ...] = Field((), repr=False, description="further servers; states are spread over all")
    shards: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="hash tags at each URL; more than one spreads the states over the nodes of a Redis Cluster"
    )
    username: str | None = Field(None, description="ACL user; the URL's own wins")
    password_file: Path | None = Field(None, description="holds the password; or set DDIL_REDIS_PASSWORD")
    connect_timeout_s: PositiveSeconds = Field(5.0, description="for the server to take a connection")
    answer_timeout_s: PositiveSeconds = Field(
        10.0, description="for the server to answer one command; raise it for one that is far or slow"
    )
    load_timeout_s: PositiveSeconds = Field(
        60.0, description="for a server that starts to load its data; raise it for a slow disk"
    )
    stop_timeout_s: PositiveSeconds = Field(20.0, description="for the run's own server to write its file and end")

    @field_validator("url", "more_urls")
    @classmethod
    def _url_has_a_scheme(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for url in (value,) if isinstance(value, str) else value or ():
            if not re.match(r"rediss?://", url):
                raise ValueError("must begin with redis:// or rediss://, as in redis://host:6379/0")
            try:
                _ = urlparse(url).port
            except ValueError:
                raise ValueError(
                    "its port is no number up to 65535; percent-encode a password with '/', '#' or '?' in it"
                ) from None
        return value

    @model_validator(mode="after")
    def _more_urls_follow_one(self) -> RedisConfig:
        if self.more_urls and self.url is None:
            raise ValueError("more_urls: set without url; put the first server into redis.url")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """Every server, the first one first; empty: embedded."""
        return () if self.url is None else (self.url, *self.more_urls)


class EvaluationConfig(Section):
    """The table at the end of a run and its report."""

    num_images: Annotated[int, Field(ge=0)] = Field(500, description="per policy; 0 skips the evaluation")
    guidance_scale: Annotated[float, Field(ge=1)] | None = Field(
        None, description="within teacher.guidance; None: 1.5, or the nearest scale in that range"
    )
    batch_size: Positive = Field(100, description="images made at once")
    seed: Annotated[int, Field(ge=0)] = Field(1234, description="of the starting noises")
    grid_images: Annotated[int, Field(ge=1, le=64)] = Field(10, description="of each policy in the report")


class Deadlines(Section):
    """How long the run's processes wait for one another, and for what they stand on; a slow disk needs longer ones.

    Those of single samples, inserts and starts are in the sections of who waits.
    """

    learner_stop_s: PositiveSeconds = Field(
        120.0,
        description="for the learner to stop, since it was last seen to get on: by an update, or a piece of its "
        "checkpoint written",
    )
    fleet_drain_s: PositiveSeconds = Field(
        40.0, description="for the rollout actors to end when the run does; longer than actor_stop_s"
    )
    actor_stop_s: PositiveSeconds = Field(20.0, description="for one rollout actor to finish its work when told to")
    redis_start_s: PositiveSeconds = Field(60.0, description="a learner worker that begins waits so long for Redis")
    redis_away_s: PositiveSeconds = Field(
        60.0, description="Redis may be away so much longer than learner.sample_timeout_s before the run is given up"
    )
    redis_back_s: PositiveSeconds = Field(
        8.0, description="`stop` takes a run whose Redis has not answered for so long for ended, Redis included"
    )
    weights_s: PositiveSeconds = Field(60.0, description="for the weight board to answer one call")
    weights_room_s: PositiveSeconds = Field(
        5.0, description="for Ray's object store to give back the room of versions that were let go of"
    )
    first_weights_s: PositiveSeconds = Field(300.0, description="a rollout actor waits so long for the first version")
    last_weights_s: PositiveSeconds = Field(
        30.0, description="for a version that is on its way to the board when training ends"
    )
    predecessor_s: PositiveSeconds = Field(
        60.0, description="for an earlier supervisor of the run to let go of its directory"
    )
    supervisor_s: PositiveSeconds = Field(60.0, description="for the run's supervisor to answer, or to be restarted")
    ending_s: PositiveSeconds = Field(
        80.0, description="for an embedded Redis and all the rest to end, after the learner and the fleet have"
    )
    launcher_s: PositiveSeconds = Field(30.0, description="a launcher that has not looked for so long is gone")
    resize_s: PositiveSeconds = Field(60.0, description="between looks for nodes that elastic learners can grow onto")
    cluster_connect_s: PositiveSeconds = Field(5.0, description="for the head at RAY_ADDRESS to take a connection")
    resources_s: PositiveSeconds = Field(
        10.0, description="for resources that the cluster has not, and whose nodes may be just starting"
    )
    busy_resources_s: PositiveSeconds = Field(
        60.0, description="for resources that others use: what has just ended gives them back within seconds"
    )
    hub_s: PositiveSeconds = Field(5.0, description="for the hub to take a connection")

    @model_validator(mode="after")
    def _fleet_outlasts_its_actors(self) -> Deadlines:
        if self.fleet_drain_s <= self.actor_stop_s:
            raise ValueError(
                f"fleet_drain_s ({self.fleet_drain_s:g}) must be longer than actor_stop_s ({self.actor_stop_s:g}): the "
                "fleet would be ended before its actors' time is over"
            )
        return self

    @property
    def silence_s(self) -> float:
        """A run whose supervisor has been silent for longer is not going on: it drains its fleet or is restarted."""
        return self.fleet_drain_s + self.supervisor_s


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
        per_worker, rest = divmod(self.learner.batch_size, self.learner.workers)
        if rest:
            raise ValueError(
                f"learner.batch_size: {self.learner.batch_size} states do not divide among "
                f"learner.workers = {self.learner.workers}; choose a multiple"
            )
        micro = self.learner.micro_batch_size
        if micro is not None and per_worker % micro:
            raise ValueError(
                f"learner.micro_batch_size: {micro} does not divide the {per_worker} states of a worker's share of "
                "learner.batch_size; choose a divisor"
            )
        if self.replay.min_size > self.replay.capacity:
            raise ValueError(
                f"replay.min_size: {self.replay.min_size} exceeds replay.capacity ({self.replay.capacity}): "
                "no sample could ever be taken; lower min_size"
            )
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
        if self.evaluation.num_images == 1:
            raise ValueError("evaluation.num_images: 1; metrics compare images: set 2 or more, or 0 for none")
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
