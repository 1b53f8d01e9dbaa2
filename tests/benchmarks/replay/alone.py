"""What needs no peer: scaling with size, a prefetching learner's waits, memory a record, and where the time goes."""

from __future__ import annotations

import cProfile
import pstats
import threading
import time
from queue import Queue
from statistics import median
from typing import Any

import numpy as np
import redis

from ddil_dist.config import ReplayConfig
from ddil_dist.replay import RedisReplay
from ddil_dist.replay.codec import Codec
from ddil_dist.states import States
from ddil_dist.types import Draw, StateSource
from tests.benchmarks.replay.worker import BATCH, SHAPE, TIMESTEPS
from tests.support.states import weights_at


def make_states(begin: int, num: int, shape: tuple[int, int, int]) -> States[Any]:
    """States with random latents, four timesteps, two sources, twenty policy versions."""
    latents = np.random.default_rng(begin).standard_normal((num, *shape), np.float32)
    columns: dict[str, Any] = {
        "source": [StateSource(1 + i % 2) for i in range(num)],
        "timestep": [TIMESTEPS[i % 4] for i in range(num)],
        "policy_version": [i % 20 for i in range(num)],
        "step_index": [0] * num,
        "trajectory_id": range(begin, begin + num),
        "guidance_scale": [3.0] * num,
        "prompt": ["a small cat"] * num,
    }
    return States.of(columns, x_t=latents)


def _timed(replay: RedisReplay, draws: list[Draw], num: int) -> list[float]:
    times = []
    for _ in range(num):
        begin = time.perf_counter()
        replay.sample(draws, timeout_s=60)
        times.append(time.perf_counter() - begin)
    return times


def scaling(url: str, *, large: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a uniform and of a stratified sample of small states, at 1,000 and at `large`, in turns."""
    replays = {}
    for size in (1000, large):
        config = ReplayConfig(capacity=size, min_size=1, error_buffer=1e15)
        replay = RedisReplay(config, url, run=f"scale-{size}", seed=0)
        batch = make_states(0, 1000, (4, 4, 4))
        for number in range(size // 1000):
            replay.insert(batch, writer="w", batch_id=number, timeout_s=60)
        replays[size] = replay
    kinds = {
        "uniform": [Draw(BATCH)],
        "stratified": [
            Draw(BATCH // 2, sources=frozenset({StateSource.STUDENT}), max_age=10),
            Draw(BATCH // 2, timesteps=frozenset({999, 250})),
        ],
    }
    times: dict[str, dict[int, list[float]]] = {kind: {size: [] for size in replays} for kind in kinds}
    for replay in replays.values():
        replay.note_weights(weights_at(20))
        begin = time.perf_counter()
        _timed(replay, kinds["uniform"], 1)
        first_s = time.perf_counter() - begin
    for _ in range(rounds):
        for kind, draws in kinds.items():
            for size, replay in replays.items():
                times[kind][size] += _timed(replay, draws, 5)
    found: dict[str, Any] = {"first_sample_large_s": first_s}
    for kind, by_size in times.items():
        small_s, large_s = (median(by_size[size]) for size in (1000, large))
        found[kind] = {"at 1000": small_s, f"at {large}": large_s, "ratio": large_s / small_s}
    for replay in replays.values():
        replay.close()
    return found


def prefetching(url: str, *, seconds: float, update_s: float = 0.05) -> dict[str, float]:
    """Share of time that a learner with a prefetching thread waits, as a writer inserts; an update takes update_s."""
    config = ReplayConfig(capacity=BATCH * 20, min_size=1, samples_per_insert=4.0, error_buffer=1e6)
    learner, writer = (RedisReplay(config, url, run="prefetch", seed=seed) for seed in (0, 1))
    states = make_states(0, 56, SHAPE)
    writer.insert(states, writer="w", batch_id=0, timeout_s=60)
    stop = threading.Event()
    ready: Queue[States[Any]] = Queue(maxsize=2)

    def prefetch() -> None:
        while not stop.is_set():
            ready.put(learner.sample([Draw(BATCH)], timeout_s=60))

    def insert() -> None:
        batch = 1
        while not stop.wait(update_s):  # 4 samples an insert: 56 states an update
            writer.insert(states, writer="w", batch_id=batch, timeout_s=60)
            batch += 1

    threads = [threading.Thread(target=work) for work in (prefetch, insert)]
    for thread in threads:
        thread.start()
    ready.get()
    waited = worked = 0.0
    while waited + worked < seconds:
        begin = time.perf_counter()
        ready.get()
        got = time.perf_counter()
        time.sleep(update_s)  # an update on another device: the core is free
        waited += got - begin
        worked += time.perf_counter() - got
    stop.set()
    while threads[0].is_alive():
        if not ready.empty():
            ready.get()
        threads[0].join(0.05)
    threads[1].join()
    learner.close()
    writer.close()
    return {"waiting_share": waited / (waited + worked), "mean_wait_s": waited * update_s / worked}


def memory(url: str) -> dict[str, float]:
    """Bytes that the server takes for a record, against its payload, by payload size."""
    found = {}
    with redis.Redis.from_url(url) as client:
        found["allocator"] = client.info("memory")["mem_allocator"]
        for shape in ((4, 8, 8), (4, 16, 16), (4, 64, 32), (4, 64, 64)):
            config = ReplayConfig(capacity=BATCH * 9, min_size=1, error_buffer=1e15)
            before = client.info("memory")["used_memory"]
            run = "memory-" + "x".join(map(str, shape))
            replay = RedisReplay(config, url, run=run, seed=0)
            for number in range(9):
                states = make_states(number * BATCH, BATCH, shape)
                replay.insert(states, writer="w", batch_id=number, timeout_s=60)
            stats = replay.stats()
            used = client.info("memory")["used_memory"] - before  # records and all that is kept beside them
            latent_bytes = int(np.prod(shape)) * 4
            found[f"latent of {latent_bytes} bytes"] = used / stats.size / (stats.size_bytes / stats.size)
            replay.close()
    return found


def anatomy(url: str) -> dict[str, float]:
    """Microseconds a record, by part, of sampling and of inserting 32 KB records."""
    config = ReplayConfig(capacity=BATCH * 12, min_size=1, error_buffer=1e15)
    replay = RedisReplay(config, url, run="anatomy", seed=0)
    states = make_states(0, BATCH, SHAPE)
    for number in range(12):
        replay.insert(states, writer="w", batch_id=number, timeout_s=60)
    _timed(replay, [Draw(BATCH)], 5)
    num = 30
    found = {"sample, whole": median(_timed(replay, [Draw(BATCH)], num)) / BATCH * 1e6}
    for name, call in (
        ("sample", lambda n: replay.sample([Draw(BATCH)], timeout_s=60)),
        ("insert", lambda n: replay.insert(states, writer="w", batch_id=100 + n, timeout_s=60)),
    ):
        profile = cProfile.Profile()
        profile.enable()
        for number in range(num):
            call(number)
        profile.disable()
        rows = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        for (_, _, function), (_, _, own_s, _, _) in rows.items():
            if function in _WIRE:
                found[f"{name}, {_WIRE[function]}"] = own_s / num / BATCH * 1e6
    codec = Codec()
    records = [memoryview(record) for record in codec.encode(states).joined()]
    found["decode, without profiling"] = _repeat(lambda: [codec.decode(record) for record in records])
    found["encode, without profiling"] = _repeat(lambda: codec.encode(states))
    rows_out = np.empty((BATCH, *SHAPE), np.float32)
    source = np.random.default_rng(0).standard_normal((BATCH, *SHAPE), np.float32)
    found["memory copy of a latent"] = _repeat(lambda: np.copyto(rows_out, source))
    replay.close()
    return found


_WIRE = {
    "<method 'recv_into' of '_socket.socket' objects>": "reading: the server, and the kernel's copy",
    "<method 'sendall' of '_socket.socket' objects>": "sending: the kernel's copy, and the server's reading",
    "<method 'join' of 'bytes' objects>": "joining the command, the one copy",
}


def _repeat(call: Any, num: int = 20) -> float:
    """Median microseconds a record of a call that handles BATCH of them."""
    times = []
    for _ in range(num):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times) / BATCH * 1e6
