"""A held-out measurement of the student as it trains: one number, from the same noise and captions every time.

Neither the noise nor, for the built-in data, the captions are trained on, and the final table's are others: a student
that was chosen by these is measured there by none of what it was chosen for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddil_dist.best import Measure
from ddil_dist.config import RunConfig
from ddil_dist.errors import ConfigError, DataError
from ddil_dist.evaluation.runs import evaluation_networks, evaluation_prompts
from ddil_dist.metrics.evaluate import Batch, EvaluationNetworks, measure_images, metric_values
from ddil_dist.metrics.trajectory import paired_errors
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import draw_noise, sample_student, sample_teacher, seeded

SEED_OFFSET = 10_000_000
"""From the final table's first noise to the first of these; generators keep 32 bits of a seed."""
NUM_PROMPTS = 1000
PAIRED = "paired_trajectory_error"
PARTS = {
    "fid": ("features", "reference"),
    "coverage": ("features", "reference_features"),
    "clip_score": ("clip",),
    "agreement": ("classify",),
}
"""Of the networks that a metric needs, by its key."""


class HeldOut:
    """What a student is worth, by `measure`. Raises ConfigError where the metric's networks are not at hand."""

    def __init__(self, config: RunConfig, problem: ImitationProblem, measure: Measure) -> None:
        self._config = config
        self._problem = problem
        self._metric = measure.metric
        self._networks = None if measure.metric == PAIRED else _networks(config, problem, measure.metric)
        prompts = evaluation_prompts(config, problem, NUM_PROMPTS)  # the final table has the first of them
        self._captions = prompts.captions[-measure.num_images :]
        self._classes = None if prompts.classes is None else prompts.classes[-measure.num_images :]
        self._rows = min(config.evaluation.batch_size, config.learner.micro_batch_size or config.learner.batch_size)
        self._teachers: list[Tensor] = []

    @torch.no_grad()
    def value(self, network: nn.Module) -> float | None:
        """The metric of a student's network in evaluation mode; None where it is not finite. Draws from no global
        generator."""
        if self._networks is None:
            value = self._paired_error(network)
        else:
            batches = (
                Batch(
                    self._problem.teacher.decode_latents(latents).cpu(),
                    self._captions[rows],
                    None if self._classes is None else self._classes[rows],
                )
                for rows, latents in self._students(network)
            )
            try:
                value = metric_values(measure_images(batches, self._networks), self._networks)[self._metric]
            except DataError:  # a pixel that is not finite
                return None
        return value if math.isfinite(value) else None

    def _paired_error(self, network: nn.Module) -> float:
        """From the teacher's own samples, which are made once."""
        if not self._teachers:
            policy, made = self._problem.teacher_policy(self._problem.teacher_grid(self._config.teacher.steps)), []
            for rows in self._chunks():
                noise, _ = self._noise(rows)
                told = self._problem.encoder.encode(self._captions[rows])
                made.append(sample_teacher(policy, noise, told, self._scale(rows)).cpu())
            self._teachers = made  # all of them, or none: memory may have been too small for one
        pairs = zip(self._students(network), self._teachers, strict=True)
        return float(torch.cat([paired_errors(ours.cpu(), theirs) for (_, ours), theirs in pairs]).mean())

    def _students(self, network: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and the student's final latents of these."""
        policy = self._problem.student_policy(network, exported=True)
        for rows in self._chunks():
            noise, generators = self._noise(rows)
            yield (
                rows,
                sample_student(
                    policy,
                    noise,
                    self._problem.encoder.encode(self._captions[rows]),
                    self._scale(rows),
                    generators=generators,
                    num_steps=self._config.student.steps,
                ),
            )

    def _chunks(self) -> Iterator[slice]:
        num = len(self._captions)
        return (slice(start, min(start + self._rows, num)) for start in range(0, num, self._rows))

    def _noise(self, rows: slice) -> tuple[Tensor, list[torch.Generator]]:
        first = self._config.evaluation.seed + SEED_OFFSET
        generators = seeded([first + row for row in range(rows.start, rows.stop)])
        return draw_noise(generators, self._problem.teacher.latent_shape, self._problem.device), generators

    def _scale(self, rows: slice) -> Tensor:
        scale = self._config.evaluation_guidance_scale
        return torch.full((rows.stop - rows.start,), scale, device=self._problem.device)


def _networks(config: RunConfig, problem: ImitationProblem, metric: str) -> EvaluationNetworks:
    """Those that this metric needs, and no other."""
    found = evaluation_networks(config, problem)
    parts: dict[str, Any] = {name: getattr(found, name, None) for name in PARTS[metric]}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise ConfigError(
            f"learner.keep_best.metric: {metric} needs {' and '.join(missing)} that are not at hand for images of "
            f"{problem.teacher.image_size} pixels; set learner.keep_best.metric={PAIRED}, which needs none"
        )
    return EvaluationNetworks(**parts)
