"""States and buffers for the replay tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from ddil_dist.config import ReplayConfig
from ddil_dist.replay.codec import Codec
from ddil_dist.states import States
from ddil_dist.types import StateSource


def make_state(number: int, *, shape: Sequence[int] = (2, 3, 4), labelled: bool = False, **fields: Any) -> States[Any]:
    """One state whose latent is filled with its number, so that what comes back can be recognised."""
    x_t = np.full((1, *shape), number, np.float32)
    given: dict[str, Any] = {
        "x_t": x_t,
        "label": x_t + 0.5 if labelled else None,
        "timestep": 999,
        "prompt": f"state {number}",
        "guidance_scale": 3.0,
        "source": StateSource.STUDENT,
        "policy_version": 0,
        "trajectory_id": number,
        "step_index": 0,
    } | fields
    columns = {name: [value] for name, value in given.items() if name not in ("x_t", "label")}
    return States.of(columns, x_t=given["x_t"], label=given["label"])


def make_states(begin: int, end: int, **fields: Any) -> States[Any]:
    return States.join([make_state(number, **fields) for number in range(begin, end)])


def record_of(states: States[Any]) -> bytes:
    """The record of one state."""
    (record,) = Codec().encode(states).joined()
    return record


def record_of_schema_1(number: int) -> bytes:
    """`make_state(number)` as schema 1 wrote it, with a seed and nobody who made a label."""
    header = msgpack.packb([0, 2, 3, 4, 999, f"state {number}", 3.0, 1, 0, number, 0, number, None])
    latent = np.full((2, 3, 4), number, np.float32).tobytes()
    parts = (struct.pack(">BI", 0xC6, len(part)) + part for part in (header, latent))
    return b"\x94\x01" + b"".join(parts) + b"\xc0"


def make_config(**changes: Any) -> ReplayConfig:
    """A small buffer whose limiter holds nothing back."""
    given: dict[str, Any] = {"capacity": 1000, "min_size": 1, "samples_per_insert": 1.0, "error_buffer": 1e9}
    return ReplayConfig(**(given | changes))
