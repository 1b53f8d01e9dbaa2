"""The learner's own update, with gradient checkpointing and compiled networks on and off."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ddil_dist.errors import EnvironmentFailure
from ddil_dist.problem import ImitationProblem
from ddil_dist.replay.memory import InMemoryReplay
from tests.benchmarks.full_size.models import Model, create_problem
from tests.benchmarks.learner.product import config_of, fill, product

STATES = 64
PROMPTS = 16


@dataclass(frozen=True)
class Variant:
    """What is switched on."""

    gradient_checkpointing: bool
    compile: bool


VARIANTS = tuple(Variant(checkpointing, compiled) for checkpointing in (False, True) for compiled in (False, True))


@dataclass(frozen=True)
class Updates:
    """What a variant came to; rows: of a backward pass, fewer than a batch's where memory ran out."""

    images_per_s: float
    first_s: float
    rows: int
    memory_bytes: int | None


def measure(
    model: Model, variant: Variant, folder: Path, device: torch.device, *, rows: int, updates: int
) -> Updates | None:
    """Progressive distillation in bf16 on labelled states from replay in memory; None: out of memory."""
    clean(device)
    try:
        return _measure(model, variant, folder, device, rows=rows, updates=updates)
    except (torch.OutOfMemoryError, EnvironmentFailure) as error:
        print(f"{model.title}, {variant}: {str(error).splitlines()[0]}", flush=True)
        return None
    finally:
        clean(device)


def settings(folder: Path, *, rows: int) -> tuple[str, ...]:
    """Overrides that the learner and the rollout engine share."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"a photo of {number} boots" for number in range(PROMPTS)))
    return (
        f"data.prompts={prompts}",
        "teacher.precision=bfloat16",
        "rollout.precision=bfloat16",
        f"rollout.batch_size={rows}",
    )


def _measure(model: Model, variant: Variant, folder: Path, device: torch.device, *, rows: int, updates: int) -> Updates:
    config = config_of(
        folder,
        *settings(folder, rows=rows),
        f"run.name={'checkpointing' if variant.gradient_checkpointing else 'plain'}-{variant.compile}",
        f"learner.batch_size={rows}",
        "learner.mixed_precision=bf16",
        "learner.optimizer.type=adamw_fused",
        f"learner.gradient_checkpointing={variant.gradient_checkpointing}",
        f"learner.compile={'default' if variant.compile else 'no'}",
        "learner.trackers=[]",
        "learner.sample_every=0",
        f"replay.min_size={rows}",
    )
    problem = create_problem(model, config, device)
    replay = InMemoryReplay(config.replay, seed=0)
    fill(replay, problem, max(STATES, rows))
    with product(config, problem, replay) as learner:
        begun = time.perf_counter()
        learner.update()
        wait(device)
        first_s = time.perf_counter() - begun
        learner.update()  # the optimizer has its state now, and the trainer has found out whether all fits
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken = []
        for _ in range(updates):
            begun = time.perf_counter()
            learner.update()
            wait(device)
            taken.append(time.perf_counter() - begun)
        return Updates(
            images_per_s=rows / statistics.median(taken),
            first_s=first_s,
            rows=min(rows, learner.rows),
            memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )


def problem_of(model: Model, folder: Path, device: torch.device, *overrides: str, rows: int) -> ImitationProblem:
    """The problem that rollouts of a model are of."""
    return create_problem(model, config_of(folder, *settings(folder, rows=rows), *overrides), device)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    """Of a variant nothing stays for the next."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
