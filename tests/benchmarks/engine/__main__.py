"""The command: `python -m tests.benchmarks.engine [all | versus | shares | labels | options] [--quick] [--json]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.engine import labels, options, versus

PARTS = ("versus", "shares", "labels", "options")


def device() -> str:
    """CPU model and cores, and the load of others as the benchmark begins."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before"


def main() -> int:
    """Run the chosen parts, one thread, on the CPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engine")
    parser.add_argument("part", choices=["all", *PARTS], nargs="?", default="all")
    parser.add_argument("--quick", action="store_true", help="one round of batches of 16")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    size, rounds = (16, 1) if chosen.quick else (64, 3)
    found: dict[str, Any] = {"device": device(), "python": sys.version.split()[0], "torch": torch.__version__}
    for part in PARTS if chosen.part == "all" else (chosen.part,):
        found[part] = _parts(size, rounds)[part]()
        if not chosen.json:
            _print(part, found)
    if chosen.json:
        print(json.dumps(found, indent=2))
    return 0


def _parts(size: int, rounds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "versus": lambda: versus.run(size, rounds),
        "shares": lambda: versus.shares(size),
        "labels": lambda: labels.run(rounds),
        "options": lambda: options.run(size, rounds),
    }


def _print(part: str, found: dict[str, Any]) -> None:
    print(f"\n{part}: {found['device']}, Python {found['python']}, torch {found['torch']}", flush=True)
    rows = found[part]
    if part == "versus":
        print("| states per CPU second at student probability | " + " | ".join(f"{p:g}" for p in rows["engine"]) + " |")
        for name, by in rows.items():
            cells = [f"{speed:.1f} ({rows['engine'][p] / speed:.2f})" for p, speed in by.items()]
            print(f"| {name} | " + " | ".join(cells) + " |")
    elif part == "shares":
        for name, row in rows.items():
            print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    else:
        first = next(iter(rows.values()))
        for name, speed in rows.items():
            print(f"| {name} | {speed:.1f} | {speed / first:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
