"""The finished student as a stock diffusers pipeline: it loads with `from_pretrained` and needs no code of ours."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_dist.diffusion.grid import Spacing, timestep_grid
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.models.pipeline import TeacherPipeline
from ddil_dist.models.quiet import quiet_bars
from ddil_dist.models.student import create_student


def student_scheduler(teacher_scheduler_config: Mapping[str, Any], *, spacing: Spacing) -> Any:
    """The stock scheduler that makes the student's transitions: DPM-Solver++ of order 1, which is DDIM.

    It reproduces `timestep_grid` and ends at sigma = 0; diffusers' DDIMScheduler does neither for every step count.
    """
    from diffusers import DPMSolverMultistepScheduler

    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    return DPMSolverMultistepScheduler(
        **{key: teacher_scheduler_config[key] for key in kept},
        solver_order=1,
        algorithm_type="dpmsolver++",
        timestep_spacing=spacing,
        final_sigmas_type="zero",
        steps_offset=1,  # of no effect on these spacings; diffusers calls any other value outdated
    )


def export_student(
    teacher: TeacherPipeline, weights: Mapping[str, Tensor], path: Path, *, num_steps: int, spacing: Spacing
) -> None:
    """Write the pipeline of a student to `path`, replacing what is there only once it is whole.

    weights: the student U-Net's state dict. The scheduler must reproduce the grid, or this raises AssertionError.
    """
    from diffusers import StableDiffusionPipeline

    unet = create_student(teacher.unet)
    unet.load_state_dict(dict(weights))
    scheduler = student_scheduler(teacher.pipeline.scheduler.config, spacing=spacing)
    scheduler.set_timesteps(num_steps)
    grid = timestep_grid(num_steps, spacing=spacing, num_train_timesteps=teacher.schedule.num_timesteps)
    assert tuple(scheduler.timesteps.tolist()) == grid
    assert torch.allclose(scheduler.alphas_cumprod.double(), _abar(teacher.schedule), rtol=1e-4)
    components = {**teacher.pipeline.components, "unet": unet.eval(), "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    staging = path.with_name(path.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with quiet_bars():
            pipeline.save_pretrained(staging, safe_serialization=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    staging.replace(path)


def _abar(schedule: NoiseSchedule) -> Tensor:
    t = torch.arange(schedule.num_timesteps)
    return (schedule.alpha(t).double() ** 2).flatten()
