"""The command: `python -m tests.benchmarks.learner [bare | lcm | overhead ...] [--rounds N] [--updates N]`.

Contestants take turns, a few updates each, round after round, in one process; what counts is the ratio within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

import torch

from ddil_dist.problem import ImitationProblem, default_device
from ddil_dist.replay import EmbeddedServer, RedisReplay
from tests.benchmarks.learner.bare import BareLoop, LcmLoop
from tests.benchmarks.learner.overhead import Overhead
from tests.benchmarks.learner.product import config_of, fill, product
from tests.benchmarks.learner.race import race, tell

STATES = 4096


def beside_a_bare_loop(folder: Path, server: EmbeddedServer, url: str, *, rounds: int, updates: int) -> None:
    """Progressive distillation on live replay."""
    config = config_of(folder, "run.name=ahead")
    problem = ImitationProblem.create(config, default_device())
    replay = RedisReplay(config.replay, url, run="bench", seed=0)
    fill(replay, problem, STATES)
    waiting = config_of(folder, "run.name=waiting", "run.execution=inline")
    with product(config, problem, replay) as ahead, product(waiting, problem, replay) as behind:
        batches = [behind._trainer._source.next(progress=0.0) for _ in range(16)]
        bare = BareLoop(config, problem, batches)
        contest = {"bare loop": bare, "learner": ahead, "learner, nothing prefetched": behind}
        taken = race(contest, rounds=rounds, updates=updates)
        tell("Progressive distillation, states and labels from replay in Redis", taken, "bare loop")
        share = ahead.waited_s / (sum(taken["learner"].clock_s) * updates)
        print(f"\nThe learner waited for replay {share:.1%} of its time.")
    replay.close()


def beside_the_lcm_example(folder: Path, server: EmbeddedServer, url: str, *, rounds: int, updates: int) -> None:
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
    waiting = config_of(folder, "run.name=lcm-waiting", "run.execution=inline", *overrides)
    images, captions = problem.open_data().images(range(512))
    embeddings = problem.encoder.encode(captions).embeddings
    with product(config, problem, replay) as ahead, product(waiting, problem, replay) as behind:
        example = LcmLoop(config, problem, images.to(problem.device), embeddings)
        contest = {"LCM example": example, "learner": ahead, "learner, nothing prefetched": behind}
        tell("Consistency distillation", race(contest, rounds=rounds, updates=updates), "LCM example")
    replay.close()


def overhead(folder: Path, server: EmbeddedServer, url: str, *, rounds: int, updates: int) -> None:
    """DDIL beside plain distillation."""
    with Overhead(folder, server, url) as contest:
        contest.run(rounds=rounds, updates=updates)


def main() -> None:
    """Run the chosen contests, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.learner")
    parser.add_argument("contests", nargs="*", metavar="bare | lcm | overhead", help="default: all")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--updates", type=int, default=20, help="of a contestant in a round")
    options = parser.parse_args()
    unknown = set(options.contests) - CONTESTS.keys()
    if unknown:
        parser.error(f"no such contests: {', '.join(sorted(unknown))}; there are {', '.join(CONTESTS)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer() as server:
        url = server.start(Path(folder))
        for name in options.contests or CONTESTS:
            CONTESTS[name](Path(folder), server, url, rounds=options.rounds, updates=options.updates)


CONTESTS = {"bare": beside_a_bare_loop, "lcm": beside_the_lcm_example, "overhead": overhead}

if __name__ == "__main__":
    main()
