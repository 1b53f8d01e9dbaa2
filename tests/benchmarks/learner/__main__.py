"""The command: `python -m tests.benchmarks.learner [--rounds N] [--updates N]`.

Contestants take turns, a few updates each, round after round, in one process; what counts is the ratio within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ddil_dist.problem import ImitationProblem, default_device
from ddil_dist.replay import EmbeddedServer, RedisReplay
from learner.trainer import frozen_heap
from tests.benchmarks.learner.bare import BareLoop, LcmLoop
from tests.benchmarks.learner.product import config_of, fill, product

STATES = 4096
WARM_UP = 5


class Contestant(Protocol):
    """A loop that can be stepped; what it has waited for batches so far."""

    waited_s: float

    def update(self) -> None: ...


@dataclass
class Taken:
    """Seconds an update, round by round: by the clock, and of the training thread, which is what it ran and waited."""

    clock_s: list[float] = field(default_factory=list)
    thread_s: list[float] = field(default_factory=list)


def race(contest: Mapping[str, Contestant], *, rounds: int, updates: int) -> dict[str, Taken]:
    """Let all take turns; the order turns round with the rounds.

    Beside other processes the clock measures them, too. The thread's own time does not: it is what the processor spent
    on it, and what it waited for batches.
    """
    for contestant in contest.values():
        for _ in range(WARM_UP):
            contestant.update()
    taken = {name: Taken() for name in contest}
    names = list(contest)
    with frozen_heap():  # as the trainer does; it spares all of them
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                contestant = contest[name]
                begun, ran, waited = time.perf_counter(), time.thread_time(), contestant.waited_s
                for _ in range(updates):
                    contestant.update()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                thread_s = time.thread_time() - ran + contestant.waited_s - waited
                taken[name].clock_s.append((time.perf_counter() - begun) / updates)
                taken[name].thread_s.append(thread_s / updates)
    return taken


def tell(title: str, taken: dict[str, Taken], against: str) -> None:
    """Print a contest as a table in Markdown. A speed is that of `against`'s time to one's own in the same round."""
    print(f"\n{title}\n\n| loop | ms, best | ms, median | speed | thread ms, median | speed by thread |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    base = taken[against]
    for name, own in taken.items():
        print(
            f"| {name} | {min(own.clock_s) * 1e3:.1f} | {statistics.median(own.clock_s) * 1e3:.1f} | "
            f"{_ratios(base.clock_s, own.clock_s)} | {statistics.median(own.thread_s) * 1e3:.1f} | "
            f"{_ratios(base.thread_s, own.thread_s)} |"
        )


def _ratios(base: list[float], own: list[float]) -> str:
    low, middle, high = statistics.quantiles([one / other for one, other in zip(base, own, strict=True)], n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def beside_a_bare_loop(folder: Path, url: str, *, rounds: int, updates: int) -> None:
    """Progressive distillation on live replay."""
    config = config_of(folder, "run.name=ahead")
    problem = ImitationProblem.create(config, default_device())
    replay = RedisReplay(config.replay, url, run="bench", seed=0)
    fill(replay, problem, STATES)
    waiting = config_of(folder, "run.name=waiting", "learner.prefetch=0")
    with product(config, problem, replay) as ahead, product(waiting, problem, replay) as behind:
        batches = [behind._trainer._source.next(progress=0.0) for _ in range(16)]
        bare = BareLoop(config, problem, batches)
        contest = {"bare loop": bare, "learner": ahead, "learner, prefetch=0": behind}
        taken = race(contest, rounds=rounds, updates=updates)
        tell("Progressive distillation, states and labels from replay in Redis", taken, "bare loop")
        share = ahead.waited_s / (sum(taken["learner"].clock_s) * updates)
        print(f"\nThe learner waited for replay {share:.1%} of its time.")
    replay.close()


def beside_the_lcm_example(folder: Path, url: str, *, rounds: int, updates: int) -> None:
    """Latent consistency distillation at equal work: data, VAE, teacher, student and target in every update."""
    overrides = (
        "objective.type=consistency",
        "teacher.steps=50",
        "student.steps=4",
        "rollout.labels=learner",
        "learner.ema_decay=0",
        "prior.parts=[{until: 1.0, forward: 1.0, student: 0.0, teacher: 0.0}]",
    )
    config = config_of(folder, "run.name=lcm", *overrides)
    problem = ImitationProblem.create(config, default_device())
    replay = RedisReplay(config.replay, url, run="lcm", seed=0)
    waiting = config_of(folder, "run.name=lcm-waiting", "learner.prefetch=0", *overrides)
    images, captions = problem.open_data().images(range(512))
    embeddings = problem.encoder.encode(captions).embeddings
    with product(config, problem, replay) as ahead, product(waiting, problem, replay) as behind:
        example = LcmLoop(config, problem, images.to(problem.device), embeddings)
        contest = {"LCM example": example, "learner": ahead, "learner, prefetch=0": behind}
        tell("Consistency distillation", race(contest, rounds=rounds, updates=updates), "LCM example")
    replay.close()


def main() -> None:
    """Run both contests."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.learner")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--updates", type=int, default=20, help="of a contestant in a round")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer() as server:
        url = server.start(Path(folder))
        for contest in (beside_a_bare_loop, beside_the_lcm_example):
            contest(Path(folder), url, rounds=options.rounds, updates=options.updates)


if __name__ == "__main__":
    main()
