"""A learner from a configuration: problem, objective, batch source, trainer, whoever runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ddil_dist.best import Measure
from ddil_dist.compiling import eagerly
from ddil_dist.config import RunConfig
from ddil_dist.journal import METRICS_FILE, Journal
from ddil_dist.problem import ImitationProblem
from ddil_dist.replay.buffer import ReplayBuffer
from ddil_dist.types import WeightsVersion
from ddil_dist.weights import WeightStore
from learner.batch_source import BatchSource
from learner.checkpoint import CheckpointStore
from learner.checkpoint_writer import CheckpointWriter
from learner.keeper import Keeper
from learner.memory import activation_bytes
from learner.methods import STUDENT, create_networks, create_objective
from learner.prefetch import Prefetch, Source
from learner.publisher import Publisher
from learner.tracking import TENSORBOARD_DIRECTORY, Watch
from learner.trainer import Trainer
from learner.training_state import Stateful, seed_random
from learner.update_record import UpdateRecord

CHECKPOINTS_DIRECTORY = "checkpoints"

logger = logging.getLogger(__name__)


def checkpoints_of(config: RunConfig) -> CheckpointStore:
    """The run's checkpoints."""
    return CheckpointStore(config.run.path / CHECKPOINTS_DIRECTORY, keep=config.learner.keep_checkpoints)


def create_accelerator(config: RunConfig, *, cpu: bool) -> Accelerator:
    """Accelerate as the configuration wants it. With one worker or on CPUs there is nothing to shard."""
    sharded = config.learner.sharding == "fsdp" and not cpu
    plugin = sharding_plugin(config.learner.mixed_precision) if sharded else None
    return Accelerator(
        mixed_precision=config.learner.mixed_precision,
        cpu=cpu,
        fsdp_plugin=plugin,
        log_with=list(config.learner.trackers) or None,
        project_config=ProjectConfiguration(str(config.run.path), str(config.run.path / TENSORBOARD_DIRECTORY)),
    )


def sharding_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """FSDP2, gathering the blocks that a diffusers network says must not be split, one at a time.

    Under mixed precision a gathered block computes in it, and gradients are averaged in float32.
    """
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=policy,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )


def create_trainer(
    config: RunConfig,
    problem: ImitationProblem,
    *,
    accelerator: Accelerator,
    replay: ReplayBuffer,
    weights: WeightStore,
    companions: Mapping[str, Stateful] = MappingProxyType({}),
    on_publish: Callable[[WeightsVersion], None] = lambda version: None,
    has_readers: Callable[[], bool] = lambda: True,
    on_update: Callable[[UpdateRecord], None] = lambda record: None,
    on_wait: Callable[[], None] = lambda: None,
    on_checkpoint: Callable[[int, int, int], None] = lambda update, written, total: None,
    is_checkpoint_wanted: Callable[[int], bool] = lambda update: False,
    is_excused: Callable[[], bool] = lambda: False,
) -> Trainer:
    """The trainer of one worker, resumed from the run's newest checkpoint if there is one.

    The batch is shared by the workers that are there, whatever number the configuration hopes for.
    """
    config = config.model_copy(update={"learner": config.learner.with_workers(accelerator.num_processes)})
    rank, main = accelerator.process_index, accelerator.is_main_process
    seed = config.run.seed * 1009 + rank
    at_learner = config.rollout.labels == "learner"
    source: Source = BatchSource(
        replay=replay,
        prior=config.prior,
        encoder=problem.encoder,
        schedule=problem.teacher.schedule,
        timesteps=problem.grid.student,
        batch_size=config.learner.worker_batch_size,
        guidance=(config.teacher.guidance.min, config.teacher.guidance.max),
        seed=seed,
        timeout_s=config.learner.sample_timeout_s,
        device=problem.device,
        labels_by_actors=not at_learner,
        noise_share=problem.noise_share,
        inputs_unused=config.objective.makes_inputs,
        latent_shape=problem.teacher.latent_shape,
        expert=problem.teacher_policy() if at_learner and config.objective.uses_labels else None,
        forward=problem.forward_data(seed=seed) if at_learner and config.prior.uses_forward else None,
        is_excused=is_excused,
    )

    if config.run.execution != "inline":
        source = Prefetch(
            source,
            updates=config.learner.updates,
            depth=config.learner.prefetch,
            device=problem.device,
        )
    seed_random(config.run.seed)  # networks begin alike on every worker
    networks = create_networks(config, problem)
    seed_random(seed)
    journal = Journal(config.run.path / METRICS_FILE) if main else None
    store = checkpoints_of(config)
    beside = config.run.execution != "inline"  # which is to be repeatable
    writer = CheckpointWriter(
        store,
        background=beside,
        silent_s=config.deadlines.learner_stop_s,
        journal=journal,
        on_progress=on_checkpoint,
    )
    publisher = Publisher(
        weights,
        dtype=config.rollout.precision,
        on_publish=on_publish,
        has_readers=has_readers,
        journal=journal,
        background=beside,
        close_s=config.deadlines.last_weights_s,
    )
    measure = Measure.of(config)
    trainer = Trainer(
        config.learner,
        accelerator=accelerator,
        networks=networks,
        make_objective=partial(create_objective, config, problem, seed=seed),
        source=source,
        timesteps=problem.grid.student,
        publisher=publisher if main else None,
        checkpoints=store,
        writer=writer,
        journal=journal,
        companions=companions,
        on_update=on_update,
        on_wait=on_wait,
        is_checkpoint_wanted=is_checkpoint_wanted,
        watch=Watch(config, problem, accelerator, networks[STUDENT], journal) if main else None,
        keeper=Keeper(config, problem, measure, journal) if main and measure is not None else None,
    )
    _tell_memory(trainer, problem, networks[STUDENT])
    return trainer


def _tell_memory(trainer: Trainer, problem: ImitationProblem, student: nn.Module) -> None:
    """Tell what an update is estimated to need, and warn where the device has less than that."""
    with eagerly(problem.config.learner.compile):
        activations = activation_bytes(lambda: _one_row(problem, student), student, problem.teacher.unet)
    needed = trainer.estimate_memory(activations)
    logger.info("memory of an update, as estimated: %s", needed)
    if problem.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(problem.device)
        more = needed.gradients + needed.optimizer + needed.average + needed.activations
        if more > free:
            logger.warning(
                "an update needs about %.1f GB more on the GPU, which has %.1f GB free; learner.micro_batch_size=%d "
                "would fit, or learner.gradient_checkpointing=true",
                *(more / 1e9, free / 1e9, max(1, int(needed.rows * (1 - (more - free) / max(1, needed.activations))))),
            )


def _one_row(problem: ImitationProblem, student: nn.Module) -> Tensor:
    """The student's answer at one state."""
    device = problem.device
    return problem.student_denoiser(student).predict(
        torch.zeros(1, *problem.teacher.latent_shape, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        problem.encoder.encode([""]),
        torch.ones(1, device=device),
    )
