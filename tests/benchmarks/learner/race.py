"""Loops that take turns, a few updates each, round after round: what counts is the ratio within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from learner.trainer import frozen_heap

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
            f"{ratios(base.clock_s, own.clock_s)} | {statistics.median(own.thread_s) * 1e3:.1f} | "
            f"{ratios(base.thread_s, own.thread_s)} |"
        )


def ratios(base: list[float], own: list[float]) -> str:
    low, middle, high = statistics.quantiles([one / other for one, other in zip(base, own, strict=True)], n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
