"""The stock scheduler that an exported student runs under: its transitions, and its grid by the scheduler's settings.

A stock pipeline is called with a number of steps, not with a grid, so a grid can only travel inside a scheduler's
settings. `student_scheduler` looks through the few that make a student's transitions for one that makes its grid.

    deterministic   DDIM on the grid: DPM-Solver++ of order 1, or DDIM's own scheduler where its steps are even
    renoising       x_0, and forward diffusion of it with fresh noise to the next grid point: LCM's scheduler, with the
                    boundary condition scaled out of reach
    consistency     the same from the consistency function's x_0: LCM's scheduler as it is
    trajectory      a DDIM step beyond the next grid point, and noise back to it: TCD's scheduler
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from ddil_dist.diffusion.parameterization import PredictionType
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.errors import ConfigError

Sampler = Literal["deterministic", "renoising", "consistency", "trajectory"]

UNBOUND_SCALING = 1e4
"""Of a timestep in LCM's boundary condition: c_skip = d^2 / ((s t)^2 + d^2) is then under 3e-9 at every t >= 1."""


def student_scheduler(
    teacher_scheduler_config: Mapping[str, Any],
    *,
    sampler: Sampler,
    timesteps: Sequence[int],
    prediction_type: PredictionType,
    solver_points: int | None = None,
    clip: float | None = None,
) -> Any:
    """The scheduler of the teacher's noise schedule whose own grid of `len(timesteps)` steps is `timesteps`.

    solver_points: of a consistency student, whose other numbers of steps must stop at points of the same grid.
    clip: of a re-noising student, whose x_0 is clamped to [-clip, clip]; None: it is used as it is.

    Raises ConfigError where no stock scheduler has that grid among its settings.
    """
    schedule = NoiseSchedule.from_scheduler_config(teacher_scheduler_config)
    settings = _noise_settings(teacher_scheduler_config) | {"prediction_type": prediction_type}
    if sampler == "deterministic":
        even = schedule.num_timesteps % len(timesteps) == 0
        candidates = _deterministic(settings, exact_ddim=even and schedule.zero_terminal_snr)
    else:
        points = range(len(timesteps), schedule.num_timesteps + 1) if solver_points is None else [solver_points]
        first = [num for num in points if schedule.num_timesteps // num * num - 1 == timesteps[0]]
        candidates = _renoising(settings, sampler, first, clip)
    for scheduler in candidates:
        scheduler.set_timesteps(len(timesteps))
        if tuple(scheduler.timesteps.tolist()) == tuple(timesteps):
            assert torch.allclose(scheduler.alphas_cumprod.double(), schedule.alphas_cumprod(), rtol=1e-4, atol=1e-7)
            return scheduler
    rule = (
        "those under student.spacing linspace, trailing or leading, and multiples of T // N plus one"
        if sampler == "deterministic"
        else "those under student.spacing=trailing where the steps divide the timesteps, and T - 1 - floor(i T / N)"
    )
    raise ConfigError(
        f"student.timesteps: no stock scheduler makes {list(timesteps)} by its settings with {sampler} transitions, "
        f"and the exported student must run without code of ours; the grids of {len(timesteps)} steps that can travel "
        f"are {rule}"
    )


def _noise_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    return {key: config[key] for key in kept if config.get(key) is not None}


def _deterministic(settings: Mapping[str, Any], *, exact_ddim: bool) -> Iterator[Any]:
    """DDIM's transitions, each with a grid of its own.

    exact_ddim: begin with DDIM's own scheduler, which takes steps of T // N timesteps, but from pure noise exactly;
    DPM-Solver++ lifts an alpha of zero to 2^-12, for the sake of its logarithms.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    ddim = {**settings, "steps_offset": 1, "set_alpha_to_one": True, "clip_sample": False}
    if exact_ddim:
        yield DDIMScheduler(**ddim, timestep_spacing="trailing")
    for spacing in ("linspace", "trailing", "leading"):
        yield DPMSolverMultistepScheduler(
            **settings,
            solver_order=1,
            algorithm_type="dpmsolver++",
            timestep_spacing=spacing,
            final_sigmas_type="zero",
            steps_offset=1,  # pipelines call any other value outdated, and change it
        )
    yield DDIMScheduler(**ddim, timestep_spacing="leading")


def _renoising(
    settings: Mapping[str, Any], sampler: Sampler, points: Sequence[int], clip: float | None
) -> Iterator[Any]:
    """LCM's transitions, or TCD's, over solvers of so many points; each grid begins at its solver's noisiest."""
    from diffusers import LCMScheduler, TCDScheduler

    if sampler == "trajectory":
        for num in points:
            yield TCDScheduler(**settings, original_inference_steps=num, clip_sample=False, steps_offset=1)
        return
    boundary = {} if sampler == "consistency" else {"timestep_scaling": UNBOUND_SCALING}
    for num in points:
        yield LCMScheduler(
            **settings,
            original_inference_steps=num,
            set_alpha_to_one=True,
            clip_sample=clip is not None,
            clip_sample_range=1.0 if clip is None else clip,
            steps_offset=1,  # of no effect here; pipelines call any other value outdated
            **boundary,
        )
