"""What can be watched while a run trains: scalars for trackers such as TensorBoard, and grids of samples.

The journal's JSON lines are always written, by the trainer. Trackers are Accelerate's, and none needs to be online.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ddil_dist.compiling import eagerly
from ddil_dist.config import RunConfig
from ddil_dist.errors import ConfigError
from ddil_dist.journal import Journal
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import draw_noise, sample_student, sample_teacher, seeded
from learner.update_record import UpdateRecord

TRACK_EVERY = 10
"""Updates between points of a curve; the journal has them all."""

logger = logging.getLogger(__name__)

DRIFT = {"latent_std": 1.25, "saturation": 1.5}
"""Ratios to the teacher's samples that are warned of."""
LEAST_SATURATION = 0.05
"""Of the teacher's images; of greyer ones a ratio would be noise."""
CAPTIONS_FILE = "captions.json"
SAMPLES_DIRECTORY = "progress"
TENSORBOARD_DIRECTORY = "tensorboard"


class Tracking:
    """Rank 0's trackers. With none configured every call does nothing."""

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        wanted = config.learner.trackers
        found = {str(getattr(kind, "value", kind)) for kind in accelerator.log_with}
        missing = sorted(set(wanted) - found)
        if missing:
            raise ConfigError(
                f"learner.trackers: {', '.join(missing)} cannot be used, the package is not installed; install it on "
                "the learner's workers, or leave it out (metrics.jsonl is written anyway)"
            )
        self._accelerator = accelerator
        if wanted:
            os.environ.setdefault("WANDB_MODE", "offline")
            accelerator.init_trackers(config.run.name, config=_flat(config.model_dump(mode="json")))

    def scalars(self, record: UpdateRecord) -> None:
        """An update's figures."""
        values = {
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "learning_rate": record.learning_rate,
            "staleness_mean": record.staleness_mean,
            "seconds/wait": record.wait_s,
            "seconds/update": record.update_s,
            **{f"loss/{source.lower()}": value for source, value in record.loss_by_source.items()},
            **{f"loss/t{timestep}": value for timestep, value in record.loss_by_timestep.items()},
            **{f"loss/{role}": value for role, value in record.losses.items()},
            **record.metrics,
        }
        self._accelerator.log(values, step=record.update)

    def image(self, name: str, pixels: npt.NDArray[np.uint8], *, update: int) -> None:
        """A picture [H, W, 3]."""
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({name: pixels[None]}, step=update, **_layout(tracker.name))

    def close(self) -> None:
        """Write out what is still on its way."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


class SampleGrid:
    """Samples of the run's first prompts as the exported student makes them, from the same noise every time."""

    def __init__(self, config: RunConfig, problem: ImitationProblem, network: nn.Module) -> None:
        options = config.evaluation
        prompts = list(dict.fromkeys(problem.prompts()))[: options.grid_images]
        self._directory = config.run.path / SAMPLES_DIRECTORY
        self._problem = problem
        self._network = network
        self._policy = problem.student_policy(network, exported=True)
        self._num_steps = config.student.steps
        self._compile = config.learner.compile
        self._prompts = prompts
        self._teacher: Look | None = None
        self._seeds = [options.seed + index for index in range(len(prompts))]
        self._conditioning = problem.encoder.encode(prompts)
        self._scale = torch.full((len(prompts),), config.evaluation_guidance_scale, device=problem.device)

    def save(self, update: int) -> tuple[npt.NDArray[np.uint8], dict[str, float]]:
        """Sample and write `progress/update_N.png`; its pixels [H, W, 3], and how they look beside the teacher's.

        The latter from the same noise, as ratios by the names of `Look`'s fields. No global generator is used.
        """
        training = self._network.training
        self._network.eval()
        try:
            generators = seeded(self._seeds)
            noise = draw_noise(generators, self._problem.teacher.latent_shape, self._problem.device)
            with eagerly(self._compile):  # a picture is not worth another graph
                latents = sample_student(
                    self._policy,
                    noise,
                    self._conditioning,
                    self._scale,
                    generators=generators,
                    num_steps=self._num_steps,
                )
            images = self._problem.teacher.decode_latents(latents)
            look = Look.of(latents, images).over(self._teachers())
        finally:
            self._network.train(training)
        pixels = _side_by_side(images)
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / CAPTIONS_FILE).write_text(json.dumps(self._prompts, ensure_ascii=False), encoding="utf-8")
        path = self._directory / f"update_{update:08d}.png"
        staged = path.with_suffix(".partial")
        Image.fromarray(pixels).save(staged, format="PNG")
        staged.replace(path)
        return pixels, look

    def _teachers(self) -> Look:
        """How the teacher's samples look; they are made once."""
        if self._teacher is None:
            noise = draw_noise(seeded(self._seeds), self._problem.teacher.latent_shape, self._problem.device)
            latents = sample_teacher(self._problem.teacher_policy(), noise, self._conditioning, self._scale)
            self._teacher = Look.of(latents, self._problem.teacher.decode_latents(latents))
        return self._teacher


@dataclass(frozen=True)
class Look:
    """What drifts in students that only learn by a critic: they grow contrasty and gaudy.

    latent_std: of the latents' elements. saturation: the pixels' mean (max - min) / max over colours, in [0, 1].
    """

    latent_std: float
    saturation: float

    @classmethod
    def of(cls, latents: Tensor, images: Tensor) -> Look:
        """Of final latents [B, C, h, w] and their images [B, 3, H, W] in [0, 1]."""
        most, least = images.amax(1), images.amin(1)
        saturation = (most - least) / most.clamp_min(1e-3)
        return cls(float(latents.std()), float(saturation.mean()))

    def over(self, teacher: Look) -> dict[str, float]:
        """Ratios to the teacher's; none of a saturation that the teacher hardly has."""
        ratios = {"latent_std": self.latent_std / max(teacher.latent_std, 1e-9)}
        if teacher.saturation > LEAST_SATURATION:
            ratios["saturation"] = self.saturation / teacher.saturation
        return ratios


class Watch:
    """All that rank 0 leaves to be watched: call it after every update, and close it at the end.

    What cannot be written, on a full disk mostly, is left out, with a warning.
    """

    def __init__(
        self,
        config: RunConfig,
        problem: ImitationProblem,
        accelerator: Accelerator,
        network: nn.Module,
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal
        self._drifts: set[str] = set()
        # A sharded network samples only with all its workers.
        self._every = 0 if accelerator.is_fsdp2 else config.learner.sample_every
        self._tracking = Tracking(config, accelerator)
        self._grid = SampleGrid(config, problem, network) if self._every else None
        self._warned = False

    def __call__(self, record: UpdateRecord) -> None:
        with self._spared():
            self._leave(record)

    def close(self) -> None:
        """Write out what is still on its way."""
        with self._spared():
            self._tracking.close()

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """The run, from files that cannot be written; said once."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning("curves or pictures cannot be written (%s); the run goes on without them", error)
            self._warned = True

    def _leave(self, record: UpdateRecord) -> None:
        last = record.update == record.total_updates
        if record.update % TRACK_EVERY == 0 or last:
            self._tracking.scalars(record)
        if self._grid is not None and (record.update % self._every == 0 or last):
            pixels, look = self._grid.save(record.update)
            self._tracking.image("samples", pixels, update=record.update)
            self._tell(look, record.update)

    def _tell(self, look: dict[str, float], update: int) -> None:
        """Journal how the samples look beside the teacher's, and warn, once each, of what has drifted."""
        if self._journal is not None:
            self._journal.write("look", update=update, **look)
        for name, ratio in look.items():
            if ratio > DRIFT[name] and name not in self._drifts:
                self._drifts.add(name)
                logger.warning(
                    "update %d: the student's samples have %.2f times the teacher's %s, from the same noise: it "
                    "drifts; look at progress/, and stop earlier or lower the learning rate",
                    *(update, ratio, name.replace("_", " ")),
                )


def _side_by_side(images: Tensor) -> npt.NDArray[np.uint8]:
    """Images [B, 3, H, W] in [0, 1] to a picture [H, B W, 3]."""
    row = torch.cat(list(images), dim=2).permute(1, 2, 0)
    pixels: npt.NDArray[np.uint8] = (row * 255).round().to("cpu", torch.uint8).numpy()
    return pixels


def _layout(tracker: str) -> dict[str, str]:
    return {"dataformats": "NHWC"} if tracker == "tensorboard" else {}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Section.key to a number or a text, which all that trackers take is."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
