"""The network that a student begins as where that is not the teacher's: a finished student's, as the last stage's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import load_file
from torch import nn

from ddil_dist.diffusion.parameterization import PredictionType
from ddil_dist.errors import ConfigError
from ddil_dist.models.student import GUIDANCE_PROJECTION


@dataclass(frozen=True)
class InitialStudent:
    """A pipeline's U-Net on disk, and what it predicts."""

    weights: tuple[Path, ...]
    prediction_type: PredictionType

    @classmethod
    def open(cls, directory: str) -> InitialStudent:
        """The pipeline at `directory`. Raises ConfigError where there is none."""
        path = Path(directory)
        scheduler = path / "scheduler" / "scheduler_config.json"
        weights = tuple(sorted((path / "unet").glob("*.safetensors")))
        if not weights or not scheduler.is_file():
            raise ConfigError(
                f"student.initial: {directory!r} is no pipeline's directory (unet/*.safetensors and "
                "scheduler/scheduler_config.json); give a finished run's student/"
            )
        told: dict[str, Any] = json.loads(scheduler.read_text(encoding="utf-8"))
        kind = told.get("prediction_type", "epsilon")
        if kind not in get_args(PredictionType):
            raise ConfigError(
                f"student.initial: {directory!r} predicts {kind!r}; supported: {', '.join(get_args(PredictionType))}"
            )
        return cls(weights, kind)

    def load_into(self, network: nn.Module) -> None:
        """Give `network` these weights; one that is told the guidance scale while they are not stays indifferent to it.

        Raises ConfigError where they are another network's.
        """
        tensors = {name: tensor.float() for path in self.weights for name, tensor in load_file(path).items()}
        own = network.state_dict()
        if GUIDANCE_PROJECTION in own:
            tensors.setdefault(GUIDANCE_PROJECTION, own[GUIDANCE_PROJECTION])
        elif GUIDANCE_PROJECTION in tensors and not tensors[GUIDANCE_PROJECTION].any():
            del tensors[GUIDANCE_PROJECTION]  # it was told the scale in vain
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if shapes != wanted:
            different = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise ConfigError(
                f"student.initial: the U-Net in {str(self.weights[0].parent)!r} is not the student's: it differs in "
                f"{different[0]} and {len(different) - 1} more; give a student that was distilled from this teacher, "
                "or set student.guidance_embedding as it was set for that one"
            )
        network.load_state_dict(tensors)
