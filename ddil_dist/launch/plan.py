"""`--dry-run`: the resolved configuration and what a launch would start, without starting anything."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

from ddil_dist.config import RunConfig, dump_config, resolve_stages
from ddil_dist.sources import resolve_data, resolve_pipeline

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
STUDENT_COPIES = 5
"""float32 values kept per student parameter: weights, gradient, two AdamW moments, weight average."""
CRITIC_COPIES = 4
"""Of a critic as large as the student: all but the weight average."""


def print_plan(config: RunConfig) -> None:
    """Print the configuration as YAML, then processes, resources and memory."""
    source = resolve_pipeline(config.teacher.pipeline)
    data = resolve_data(config.data) if config.needs_data else "none needed"
    print(dump_config(config))
    print("# plan")
    for line in (
        *_stages(config),
        *_processes(resolve_stages(config)[-1]),
        *_memory(config, Path(source)),
        f"data: {data}",
        f"run directory: {config.run.path}",
    ):
        print(f"#   {line}")


def _stages(config: RunConfig) -> list[str]:
    """A line a stage of a curriculum."""
    if config.curriculum is None:
        return []
    return [
        f"stage {number}: {stage.objective.type}, {stage.teacher.steps} teacher steps to {stage.student.steps}, "
        f"{stage.learner.updates} updates, in {stage.run.path}"
        for number, stage in enumerate(resolve_stages(config), start=1)
    ]


def _processes(config: RunConfig) -> list[str]:
    if config.run.execution == "inline":
        return ["processes: 1 (rollouts, replay and learner in turn; no Ray, no Redis)"]
    rollout, learner = config.rollout, config.learner
    replay = "embedded server on the loopback" if config.redis.url is None else "the server of redis.url"
    return [
        f"rollout actors: {rollout.actors}, each {rollout.num_cpus:g} CPU, {_gpus(rollout.num_gpus)}"
        f"{_custom(rollout.resources)}",
        f"learner workers: {learner.workers}, each {learner.num_cpus:g} CPU, {_gpus(learner.num_gpus)}"
        f"{_custom(learner.resources)}",
        f"in all: {required_resources(config)}",
        f"replay: {replay}, at most {config.replay.capacity_bytes / 2**20:,.0f} MiB",
        f"updates: {config.learner.updates} of {config.learner.batch_size} states; one student step equals "
        f"{config.grid.substeps} teacher steps; labels made by {config.rollout.labels}",
    ]


def required_resources(config: RunConfig) -> dict[str, float]:
    """Ray resources that the whole run needs at once, at the least, by name."""
    total: dict[str, float] = {}
    workers = config.learner.min_workers or config.learner.workers
    for count, section in ((config.rollout.actors, config.rollout), (workers, config.learner)):
        for name, amount in {"CPU": section.num_cpus, "GPU": section.num_gpus, **section.resources}.items():
            if amount * count:
                total[name] = total.get(name, 0.0) + amount * count
    return total


def _gpus(num: float) -> str:
    return f"{num:g} GPU" if num else "no GPU, so it computes on the CPU"


def _custom(resources: dict[str, float]) -> str:
    return "".join(f", {amount:g} {name}" for name, amount in resources.items())


def _memory(config: RunConfig, pipeline: Path) -> list[str]:
    if not pipeline.is_dir():
        return [f"memory: unknown until {config.teacher.pipeline} is downloaded"]
    variant = config.teacher.variant
    unet = _parameters(pipeline / "unet", variant)
    rest = sum(
        _parameters(folder, variant) for folder in pipeline.iterdir() if folder.is_dir() and folder.name != "unet"
    )
    teacher = (unet + rest) * BYTES[config.teacher.precision]
    copies = STUDENT_COPIES + CRITIC_COPIES * len(config.objective.roles)
    lines = [f"parameters: {unet / 1e6:,.2f} M U-Net, {rest / 1e6:,.2f} M text encoders and VAE"]
    if config.student.lora is not None:
        return [
            *lines,
            f"memory of a process: {teacher / 2**20:,.0f} MiB, the adapter (learner: {copies} times), activations",
        ]
    student = unet * 4 * copies
    return [
        *lines,
        f"memory of a learner worker: {(student + teacher) / 2**20:,.0f} MiB and activations",
        f"memory of a rollout actor: {(unet * 4 + teacher) / 2**20:,.0f} MiB and activations",
        f"one published weights version: {unet * 4 / 2**20:,.1f} MiB",
    ]


def _parameters(folder: Path, variant: str | None) -> int:
    """Number of parameters in a component's safetensors files, read from their headers.

    Of several variants of the weights, those that are loaded: the configured one, where the component has it.
    """
    variants: dict[str, list[Path]] = {}
    for path in folder.glob("*.safetensors"):
        name = re.sub(r"-\d+-of-\d+", "", path.name.removesuffix(".safetensors"))
        variants.setdefault(name.partition(".")[2], []).append(path)
    total = 0
    for path in variants.get(variant or "", []) or variants.get("", []):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
