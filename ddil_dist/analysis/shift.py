"""Covariate shift, measured: where the student goes, what it does there, and what becomes of its errors.

At every point of its path the student's transition is compared with the teacher's from the same state, for states of
three origins under the same prompts: data diffused forward, the teacher's trajectory, and its own. Ross and Bagnell's
covariate shift (2010) is that the last error is the larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ddil_dist.analysis.path import Batch, SharedPath, batches
from ddil_dist.analysis.results import PointShift, ShiftResult
from ddil_dist.analysis.two_sample import median_bandwidth, permutation_test
from ddil_dist.metrics.intervals import Floats, interval, resampled_means
from ddil_dist.metrics.trajectory import paired_errors

FORWARD: Final = "forward"
TEACHER: Final = "teacher"
VISITED: Final = "visited"
ORIGINS: Final = (FORWARD, TEACHER, VISITED)

ROUNDING: Final = 1e-12
"""Squared, of latents in float32: the ratio of two errors that are nothing else is 1."""


@dataclass
class _Measured:
    """Of all trajectories so far, a list of rows for each point and origin."""

    errors: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    features: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    final: dict[int, list[Tensor]] = field(default_factory=dict)


def measure_shift(
    path: SharedPath,
    latents: Tensor,
    prompts: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    advance: Callable[[int], Any] = lambda rows: None,
) -> ShiftResult:
    """The shift over 2 N rows of data.

    latents: [2 N, C, H, W] VAE-scaled, of data, and `prompts` their captions. The first N are compared with
    trajectories under the same captions; the others are the sample that distances are measured from.
    advance: told how many of the N trajectories have been measured since it was last told.
    """
    num = len(latents) // 2
    assert len(latents) == len(prompts) == 2 * num, "two rows of data for a trajectory"
    found = _Measured()
    features = MiddleFeatures(path)
    for begin, end in batches(num, batch_size):
        batch = path.batch(prompts[begin:end], seed=seed + begin)
        others = path.batch(prompts[num + begin : num + end], seed=seed + num + begin)
        _measure(path, batch, latents[begin:end], found, features)
        for step in range(path.num_steps):
            states = _diffused(path, step, latents[num + begin : num + end], others)
            found.features.setdefault((step, "other"), []).append(features(states, step, others))
        advance(end - begin)
    return _summarise(path, found, seed)


def _measure(path: SharedPath, batch: Batch, latents: Tensor, found: _Measured, features: MiddleFeatures) -> None:
    own, expert = [batch.noise], [batch.noise]
    for step in range(path.num_steps):
        own.append(path.student_step(own[-1], step, batch))
        expert.append(path.teacher_step(expert[-1], step, batch))
    for step in range(path.num_steps):
        states = {FORWARD: _diffused(path, step, latents, batch), TEACHER: expert[step], VISITED: own[step]}
        for origin, x_t in states.items():
            found.errors.setdefault((step, origin), []).append(_one_step_errors(path, x_t, step, batch))
            found.features.setdefault((step, origin), []).append(features(x_t, step, batch))
        x = expert[step]
        for rest in range(step, path.num_steps):
            x = path.student_step(x, rest, batch)
        found.final.setdefault(step, []).append(paired_errors(x, expert[-1]))


def _diffused(path: SharedPath, step: int, latents: Tensor, batch: Batch) -> Tensor:
    """The data at the path's `step`-th point, by the trajectories' noise: paired, so that less is left to chance."""
    t = torch.full((len(latents),), path.timesteps[step], device=latents.device)
    return path.problem.teacher.schedule.add_noise(latents, batch.noise, t)


def _one_step_errors(path: SharedPath, x_t: Tensor, step: int, batch: Batch) -> Tensor:
    """[B] mean squared differences of what student and teacher make of x_t.

    Of a student of DDIM's transitions, the next latents. One that re-noises answers with x_0, and is compared with the
    teacher's from there to the end.
    """
    if not path.student.uses_noise:
        return paired_errors(path.student_step(x_t, step, batch), path.teacher_step(x_t, step, batch))
    t = torch.full((len(x_t),), path.timesteps[step], device=x_t.device)
    with torch.no_grad():
        x_0 = path.student.predict_x_0(x_t, t, batch.conditioning, batch.guidance_scale)
    return paired_errors(x_0, path.teacher_step(x_t, step, batch, to=path.num_steps))


class MiddleFeatures:
    """What the teacher's network sees in a state: its innermost block's output, mean and deviation of each channel.

    Pixels of noisy latents are mostly noise, by which two sets of states cannot be told apart.
    """

    def __init__(self, path: SharedPath) -> None:
        self._path = path
        unet: Any = path.problem.teacher.unet
        self._block = unet.mid_block if unet.mid_block is not None else unet.down_blocks[-1]
        self._embeds_guidance = path.problem.teacher_denoiser().embeds_guidance

    @torch.no_grad()
    def __call__(self, x_t: Tensor, step: int, batch: Batch) -> Tensor:
        """[B, 2 D] float64 on the CPU, of states at the path's `step`-th point under their prompts."""
        seen: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        t = torch.full((len(x_t),), self._path.timesteps[step], device=x_t.device)
        scale = batch.guidance_scale if self._embeds_guidance else None
        handle = self._block.register_forward_hook(keep)
        try:
            self._path.problem.teacher_denoiser().predict(x_t, t, batch.conditioning, scale)
        finally:
            handle.remove()
        flat = seen[0].double().flatten(2)
        return torch.cat([flat.mean(2), flat.std(2, correction=0)], dim=1).cpu()


def _summarise(path: SharedPath, found: _Measured, seed: int) -> ShiftResult:
    keys = [(step, origin) for step in range(path.num_steps) for origin in ORIGINS]
    rows = [torch.cat(found.errors[key]).numpy() for key in keys]
    rows += [torch.cat(found.final[step]).numpy() for step in range(path.num_steps)]
    means = resampled_means(np.stack(rows), seed=seed)
    column = {key: means[:, index] for index, key in enumerate(keys)}
    final = means[:, len(keys) :]
    ratios = [(column[step, VISITED] + ROUNDING) / (column[step, FORWARD] + ROUNDING) for step in range(path.num_steps)]
    points = [
        PointShift(
            timestep=path.timesteps[step],
            error_forward=interval(column[step, FORWARD]),
            error_teacher=interval(column[step, TEACHER]),
            error_visited=interval(column[step, VISITED]),
            ratio=interval(ratios[step]),
            final_error=interval(final[:, step]),
            **_distances(found, step, seed),
        )
        for step in range(path.num_steps)
    ]
    return ShiftResult(points=points, overall=interval(_geometric_mean(ratios[1:])) if len(ratios) > 1 else None)


def _geometric_mean(ratios: Sequence[Floats]) -> Floats:
    mean: Floats = np.exp(np.mean(np.log(ratios), axis=0))
    return mean


def _distances(found: _Measured, step: int, seed: int) -> Mapping[str, Any]:
    """All from the same other rows of data, so that distances and floor can be compared."""
    samples = {origin: torch.cat(found.features[step, origin]) for origin in (*ORIGINS, "other")}
    other = samples["other"]
    scale = other.std(0).clamp_min(1e-12)
    samples = {origin: rows / scale for origin, rows in samples.items()}
    bandwidth = median_bandwidth(samples[FORWARD], samples["other"])
    tested = {
        origin: permutation_test(samples[origin], samples["other"], bandwidth=bandwidth, seed=seed)
        for origin in ORIGINS
    }
    return {
        "distance_visited": tested[VISITED][0],
        "p_visited": tested[VISITED][1],
        "distance_teacher": tested[TEACHER][0],
        "p_teacher": tested[TEACHER][1],
        "distance_floor": tested[FORWARD][0],
    }
