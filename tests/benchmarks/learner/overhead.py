"""What DDIL costs the learner's clock: plain distillation beside DDIL whose replay buffer real rollouts fill meanwhile.

All make the same update, progressive distillation with the expert asked at the learner. Plain distillation has forward
states alone, no actor and no replay buffer; DDIL draws half of its states from Redis, into which a process on another
core rolls out, with the student that the learner published. Beside these two, plain distillation while the actor runs
says what it takes from the machine, and DDIL while it stands still, on a filled buffer, what DDIL takes of the
learner. Nothing is prefetched, so whatever drawing costs is in the path.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.rollout import Rollout
from ddil_dist.errors import WeightsError
from ddil_dist.problem import ImitationProblem, default_device
from ddil_dist.replay import EmbeddedServer, RedisReplay
from ddil_dist.types import NO_POLICY, WeightsVersion
from ddil_dist.weights import PackedWeights
from tests.benchmarks.learner.product import Product, config_of, fill, product
from tests.benchmarks.learner.race import Taken, race, ratios

STATES = 4096
START_S = 120.0
REFRESH_S = 0.5
"""Between an actor's looks for newer weights, as in a run."""

PLAIN = "plain distillation"
PLAIN_BESIDE = "plain distillation, beside an actor"
STILL = "DDIL, replay filled, actor still"
LIVE = "DDIL, live"
AT_ACTORS = "DDIL, live, labels made by actors"
FORWARD_ALONE = "prior.parts=[{until: 1.0, forward: 1.0, student: 0.0, teacher: 0.0}]"
MIXED = "prior.parts=[{until: 1.0, forward: 0.5, student: 0.25, teacher: 0.25}]"
BASE = ("run.execution=inline", "learner.sample_every=0", "learner.checkpoint_every=1000000")


class FolderWeightStore:
    """Published weights in a folder that two processes share; the newest two are kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def publish(self, packed: PackedWeights) -> None:
        """See `WeightStore.publish`."""
        number = packed.version.version
        np.save(self._folder / f"{number}.npy", packed.buffer)
        staged = self._folder / "staged"
        staged.write_text(json.dumps({"version": asdict(packed.version), "layout": packed.layout}))
        staged.replace(self._folder / f"{number}.json")
        for old in sorted(int(path.stem) for path in self._folder.glob("*.json"))[:-2]:
            (self._folder / f"{old}.json").unlink()
            (self._folder / f"{old}.npy").unlink()

    def newest(self) -> WeightsVersion | None:
        """See `WeightStore.newest`."""
        numbers = [int(path.stem) for path in self._folder.glob("*.json")]
        return self._described(max(numbers))[0] if numbers else None

    def load(self, version: int) -> PackedWeights:
        """See `WeightStore.load`."""
        try:
            identity, layout = self._described(version)
            return PackedWeights(identity, layout, np.load(self._folder / f"{version}.npy"))
        except OSError as error:
            raise WeightsError(f"weights version {version} is not kept: {error}") from error

    def _described(self, version: int) -> tuple[WeightsVersion, Any]:
        described = json.loads((self._folder / f"{version}.json").read_text())
        layout = tuple((name, tuple(shape)) for name, shape in described["layout"])
        return WeightsVersion(**described["version"]), layout


def act(folder: Path, url: str, overrides: Sequence[str], cores: set[int]) -> None:
    """A rollout process of a run: newest weights, rollouts, inserts, for ever."""
    pin(0, cores)
    torch.set_num_threads(1)
    config = config_of(folder, *overrides)
    problem = ImitationProblem.create(config, default_device())
    replay = RedisReplay(config.replay, url, run=config.run.name, seed=1)
    store = FolderWeightStore(folder / f"weights-{config.run.name}")
    rollout = Rollout(config, problem, weights=store, replay=replay, writer="actor-0.0")
    looked = 0.0
    while True:
        if time.monotonic() >= looked + REFRESH_S:
            looked = time.monotonic()
            rollout.refresh()
        if rollout.applied is not None:
            rollout.work()


class Actor:
    """A rollout process that stands still unless it is let run."""

    def __init__(self, folder: Path, url: str, overrides: Sequence[str], cores: set[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=act, args=(folder, url, overrides, cores), daemon=True)
        self._process.start()
        self.ran_s = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()
        self._signal(signal.SIGCONT)

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGSTOP)
        self.ran_s += time.perf_counter() - self._begun

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        if not self._process.is_alive():
            raise RuntimeError("the rollout process has died; its error is above")
        os.kill(self._process.pid, number)


class Beside:
    """A loop whose updates an actor runs beside, and no one else's."""

    def __init__(self, loop: Product, actor: Actor) -> None:
        self._loop = loop
        self._actor = actor

    @property
    def waited_s(self) -> float:
        return self._loop.waited_s

    def update(self) -> None:
        """One update, the actor running."""
        with self._actor:
            self._loop.update()


class Overhead(ExitStack):
    """The contest. The learner's loop has the first core, actors and Redis the second, where there are two."""

    def __init__(self, folder: Path, server: EmbeddedServer, url: str) -> None:
        super().__init__()
        self._folder = folder
        self._url = url
        own = os.sched_getaffinity(0)
        first, *others = sorted(own)
        self._others = set(others[:1]) or {first}
        for process in (0, server.pid):
            assert process is not None
            pin(process, {first} if process == 0 else self._others)
            self.callback(pin, process, own)
        self._actors: dict[str, Actor] = {}
        self._replays: dict[str, RedisReplay] = {}

    def run(self, *, rounds: int, updates: int) -> None:
        """Let all take turns, and print two tables."""
        problem = ImitationProblem.create(config_of(self._folder), default_device())
        prompts = list(dict.fromkeys(problem.prompts()))
        for first in range(0, len(prompts), 256):
            problem.encoder.encode(prompts[first : first + 256])
        plain = self._product(problem, "plain", FORWARD_ALONE, "rollout.labels=learner")
        still = self._product(problem, "still", MIXED, "rollout.labels=learner")
        live = self._product(problem, "live", MIXED, "rollout.labels=learner", acted=True)
        labelled = self._product(problem, "labelled", MIXED, "rollout.labels=actors", acted=True)
        contest = {
            PLAIN: plain,
            PLAIN_BESIDE: Beside(plain, self._actors["live"]),
            STILL: still,
            LIVE: Beside(live, self._actors["live"]),
            AT_ACTORS: Beside(labelled, self._actors["labelled"]),
        }
        taken = race(contest, rounds=rounds, updates=updates)
        _tell(taken)
        for name, actor in self._actors.items():
            stats = self._replays[name].stats()
            versions = sorted(version for version in stats.by_version if version != NO_POLICY)
            print(
                f"\n{name}: the actor ran {actor.ran_s:.0f} s and inserted {stats.num_inserted - STATES} states, of "
                f"student versions {versions[0]} to {versions[-1]}, of which {stats.newest_version} is the newest."
            )

    def _product(self, problem: ImitationProblem, name: str, *overrides: str, acted: bool = False) -> Product:
        """A learner on a replay buffer of its own, filled, and its actor, standing still."""
        overrides = (f"run.name={name}", *overrides, *BASE)
        config = config_of(self._folder, *overrides)
        replay = RedisReplay(config.replay, self._url, run=name, seed=0)
        self.callback(replay.close)
        fill(replay, problem, STATES)
        self._replays[name] = replay
        store = FolderWeightStore(self._folder / f"weights-{name}") if acted else None
        made = self.enter_context(product(config, problem, replay, store))
        if acted:
            made.publish()
            actor = Actor(self._folder, self._url, overrides, self._others)
            self.callback(actor.close)
            self._actors[name] = actor
            deadline = time.monotonic() + START_S
            with actor:
                while replay.stats().num_inserted == STATES and time.monotonic() < deadline:
                    time.sleep(0.1)
            assert replay.stats().num_inserted > STATES, f"the actor inserted nothing in {START_S:g} s"
        return made


def pin(process: int, cores: set[int]) -> None:
    """Let a process, 0 for this one, run on these cores alone."""
    os.sched_setaffinity(process, cores)


def _tell(taken: Mapping[str, Taken]) -> None:
    print(
        "\nProgressive distillation, plain and as DDIL: time of an update over plain distillation's in the same round"
    )
    print("\n| loop | ms, best | ms, median | updates a second | time | time by thread |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, own in taken.items():
        print(
            f"| {name} | {min(own.clock_s) * 1e3:.1f} | {statistics.median(own.clock_s) * 1e3:.1f} | "
            f"{1 / statistics.median(own.clock_s):.2f} | {ratios(own.clock_s, taken[PLAIN].clock_s)} | "
            f"{ratios(own.thread_s, taken[PLAIN].thread_s)} |"
        )
    beside, labels = (ratios(taken[name].clock_s, taken[PLAIN_BESIDE].clock_s) for name in (LIVE, AT_ACTORS))
    print(f"\nBeside plain distillation with the actor running: {LIVE} {beside}, {AT_ACTORS} {labels}.")
    faster = ratios(taken[LIVE].clock_s, taken[AT_ACTORS].clock_s)
    print(f"Updates a second with labels made by actors, over those with the expert at the learner: {faster}.")
