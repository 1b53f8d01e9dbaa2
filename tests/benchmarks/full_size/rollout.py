"""The rollout engine's two calls: the guided teacher's, and the student's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from actors.acceleration import accelerated
from tests.benchmarks.full_size.learner import clean, problem_of, wait
from tests.benchmarks.full_size.models import Model

GUIDANCE_SCALE = 4.0


def measure(
    model: Model, folder: Path, device: torch.device, *, compiled: bool, rows: int, calls: int
) -> dict[str, float | None]:
    """Images a second of each policy's call, a whole batch of rows; None: out of memory."""
    clean(device)
    mode = f"rollout.compile={'default' if compiled else 'no'}"
    found: dict[str, float | None] = {"teacher, guided": None, "student": None}
    try:
        problem = problem_of(model, folder, device, mode, rows=rows)
        config = problem.config.rollout
        student = problem.new_student().requires_grad_(False).eval().to(torch.bfloat16)
        teacher = problem.teacher_policy(unet=accelerated(problem.teacher.unet, config, device))
        policy = problem.student_policy(accelerated(student, config, device))
        x = torch.randn(rows, *problem.teacher.latent_shape, device=device)
        index = torch.zeros(rows, dtype=torch.int64, device=device)
        told = (problem.encoder.encode(problem.prompts()[:1] * rows), torch.full((rows,), GUIDANCE_SCALE).to(device))
        found["teacher, guided"] = rows / _seconds(lambda: teacher.substep(x, index, index, *told), device, calls)
        found["student"] = rows / _seconds(lambda: policy.step(x, index, *told), device, calls)
    except torch.OutOfMemoryError as error:
        print(f"{model.title}, rollout: {str(error).splitlines()[0]}", flush=True)
    finally:
        clean(device)
    return found


@torch.no_grad()
def _seconds(call: Callable[[], Tensor], device: torch.device, calls: int) -> float:
    """Of a call: the median, after two that are not counted."""
    taken = []
    for number in range(calls + 2):
        begun = time.perf_counter()
        call()
        wait(device)
        if number >= 2:
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)
