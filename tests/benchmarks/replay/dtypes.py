"""What latents in 16 bits save of the buffer and its traffic, and what they cost the loss."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch

from ddil_dist.config import ReplayConfig
from ddil_dist.replay import RedisReplay
from ddil_dist.states import LATENT_DTYPES, States, at_rest, to_tensor
from ddil_dist.types import Draw
from learner.methods import create_networks, create_objective
from tests.benchmarks.engine.scene import CPU, EngineRun
from tests.benchmarks.replay.alone import make_states
from tests.benchmarks.replay.worker import BATCH

SHAPES = ((4, 8, 8), (4, 64, 64))
NUM_STATES = 1024


def run(url: str, *, rounds: int) -> dict[str, Any]:
    """By dtype and shape: bytes a labelled record, and states a second; and what rounding adds to the loss."""
    found: dict[str, Any] = {}
    for shape in SHAPES:
        plain = make_states(0, BATCH, shape)
        replays = {}
        for dtype in LATENT_DTYPES:
            x_t = at_rest(torch.from_numpy(plain.x_t), dtype)
            states = replace(plain, x_t=x_t, label=x_t)
            config = ReplayConfig(capacity=8 * BATCH, min_size=1, error_buffer=1e15, latent_dtype=dtype)
            replay = RedisReplay(config, url, run=f"{dtype}-{shape[1]}", seed=0)
            replays[dtype] = replay, states, replay.codec.encode(states).meta["size"]
        seconds: dict[tuple[str, str], list[float]] = {}
        for turn in range(rounds):
            for dtype, (replay, states, _) in replays.items():
                begun = time.perf_counter()
                replay.insert(states, writer="w", batch_id=turn, timeout_s=60)
                inserted = time.perf_counter()
                replay.sample([Draw(BATCH)], timeout_s=60)
                seconds.setdefault((dtype, "insert"), []).append(inserted - begun)
                seconds.setdefault((dtype, "sample"), []).append(time.perf_counter() - inserted)
        for dtype, (replay, _, sizes) in replays.items():
            found[f"{dtype} {'x'.join(map(str, shape))}"] = {
                "bytes": int(np.median(sizes)),
                **{f"{name}s_per_s": round(BATCH / median(seconds[dtype, name])) for name in ("insert", "sample")},
            }
            replay.close()
    return found | loss_differences()


def loss_differences() -> dict[str, Any]:
    """Of progressive distillation of the built-in pipeline at labelled states of all kinds, before training."""
    bench = EngineRun(64, "rollout.labels=actors")
    problem, engine = bench.problem, bench.engine
    engine.set_policy(0, student_probability=0.5, forward_share=0.5)
    made: list[States[Any]] = []
    while sum(map(len, made)) < NUM_STATES:
        made += engine.tick()
    states = States.join(made)
    objective: Any = create_objective(problem.config, problem, create_networks(problem.config, problem), seed=0)

    def losses(dtype: str) -> torch.Tensor:
        found = []
        for part in states.split(128):
            label = None if part.label is None else at_rest(to_tensor(part.label), dtype)
            rounded = replace(part, x_t=at_rest(to_tensor(part.x_t), dtype), label=label).tensors(CPU)
            with torch.no_grad():
                batch = replace(rounded, conditioning=problem.encoder.encode(part.prompt))
                found.append(objective.loss(batch).per_sample)
        return torch.cat(found)

    exact = losses("float32")
    return {
        f"loss, {dtype}": {
            "mean": f"{rounded.mean():.6f}",
            "relative difference of the mean": f"{(rounded.mean() / exact.mean() - 1):.1e}",
            "median of a state's": f"{((rounded - exact).abs() / exact).median():.1e}",
            "largest of a state's, absolute": f"{(rounded - exact).abs().max():.1e}",
        }
        for dtype, rounded in ((dtype, losses(dtype)) for dtype in LATENT_DTYPES)
    }
