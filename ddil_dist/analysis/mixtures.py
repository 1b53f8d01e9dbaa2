"""Trajectories that teacher and student share, as in the paper's appendix E: who may begin, and who must end?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ddil_dist.analysis.path import SharedPath, batches
from ddil_dist.analysis.results import Mixture, MixtureKind
from ddil_dist.metrics.trajectory import paired_trajectory_error

TEACHER_PROBABILITIES: Final = (0.2, 0.4, 0.6, 0.8)

Measure = Callable[[Tensor], dict[str, float]]
"""Images [N, 3, H, W] in [0, 1] to metrics by key."""


@dataclass(frozen=True)
class _Plan:
    kind: MixtureKind
    teacher: float
    timestep: int | None
    by_teacher: Tensor
    """[N, steps] bool."""


def measure_mixtures(
    path: SharedPath,
    prompts: Sequence[str],
    measure: Measure,
    *,
    seed: int,
    batch_size: int,
    advance: Callable[[int], Any] = lambda rows: None,
) -> list[Mixture]:
    """Every mixture from the same noise and prompts: the teacher alone first, the student alone last.

    The teacher makes its transitions on the student's points, in the substeps that label. advance: told how many
    trajectories have been made since it was last told.
    """
    mixtures: list[Mixture] = []
    reference: Tensor | None = None
    for plan in _plans(path, len(prompts), seed):
        latents, images = [], []
        for begin, end in batches(len(prompts), batch_size):
            batch = path.batch(prompts[begin:end], seed=seed + begin)
            final = path.shared(batch, plan.by_teacher[begin:end])
            latents.append(final.cpu())
            images.append(path.problem.teacher.decode_latents(final).cpu())
            advance(end - begin)
        final = torch.cat(latents)
        metrics = measure(torch.cat(images))
        if reference is None:
            reference = final
        else:
            metrics["paired_trajectory_error"] = paired_trajectory_error(final, reference)
        mixtures.append(Mixture(kind=plan.kind, teacher=plan.teacher, timestep=plan.timestep, metrics=metrics))
    return mixtures


def num_mixtures(path: SharedPath) -> int:
    """How many mixtures there are of this path."""
    return 2 + len(TEACHER_PROBABILITIES) + 2 * (path.num_steps - 1)


def _plans(path: SharedPath, num: int, seed: int) -> list[_Plan]:
    steps = path.num_steps
    everywhere = torch.ones(num, steps, dtype=torch.bool)
    draws = torch.rand(num, steps, generator=torch.Generator().manual_seed(seed))
    plans = [_Plan("alone", 1.0, None, everywhere)]
    plans += [_Plan("random", p, None, draws < p) for p in reversed(TEACHER_PROBABILITIES)]
    for kind in ("teacher first", "student first"):
        for switch in range(1, steps):
            begins = torch.arange(steps) < switch
            by_teacher = begins if kind == "teacher first" else ~begins
            share = float(by_teacher.double().mean())
            plans.append(_Plan(kind, share, path.timesteps[switch], by_teacher.expand(num, steps)))
    return [*plans, _Plan("alone", 0.0, None, ~everywhere)]
