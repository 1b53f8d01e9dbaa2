"""States and buffers for the replay tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddil_dist.config import ReplayConfig
from ddil_dist.types import Latent, LatentState, StateSource


def make_state(number: int, *, shape: Sequence[int] = (2, 3, 4), labelled: bool = False, **fields: Any) -> LatentState:
    """A state whose latent is filled with its number, so that what comes back can be recognised."""
    array = np.full(shape, number, np.float32)
    given: dict[str, Any] = {
        "latent": Latent(array, "float32"),
        "timestep": 999,
        "prompt": f"state {number}",
        "guidance_scale": 3.0,
        "source": StateSource.STUDENT,
        "policy_version": 0,
        "trajectory_id": number,
        "step_index": 0,
        "seed": number,
    }
    if labelled:
        given |= {"label": Latent(array + 0.5, "float32"), "label_version": "teacher"}
    return LatentState(**(given | fields))


def make_states(begin: int, end: int, **fields: Any) -> list[LatentState]:
    return [make_state(number, **fields) for number in range(begin, end)]


def make_config(**changes: Any) -> ReplayConfig:
    """A small buffer whose limiter holds nothing back."""
    given: dict[str, Any] = {"capacity": 1000, "min_size": 1, "samples_per_insert": 1.0, "error_buffer": 1e9}
    return ReplayConfig(**(given | changes))
