"""What each option of the networks does to the engine's states per second, beside none of them."""

from __future__ import annotations

import statistics
from typing import Any

from tests.benchmarks.engine.scene import EngineRun

OPTIONS = {
    "none": (),
    "channels_last": ("rollout.channels_last=true",),
    "bfloat16": ("rollout.precision=bfloat16", "teacher.precision=bfloat16"),
    "compile": ("rollout.compile=default",),
}


def run(batch_size: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which the options take turns; half of the transitions are the student's."""
    engines = {
        name: EngineRun(batch_size, "rollout.labels=learner", *more, clock=False) for name, more in OPTIONS.items()
    }
    for engine in engines.values():
        engine.turn(0.5)  # compiles
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            speeds[name].append(engine.turn(0.5).states_per_s)
    return {name: statistics.median(found) for name, found in speeds.items()}
