"""The command: `python -m tests.benchmarks.replay [all | PART] [--quick] [--aof] [--json]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from ddil_dist.replay import EmbeddedServer
from tests.benchmarks.replay import alone, dtypes, versus
from tests.benchmarks.replay.worker import BATCH

PARTS = ("peers", "scaling", "prefetching", "memory", "anatomy", "dtypes")


def device() -> str:
    """CPU model and cores, and the load of others as the benchmark begins."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before"


def main() -> int:
    """Run the chosen parts; returns 0, also where a target is missed: the tables say so."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.replay")
    parser.add_argument("part", choices=["all", *PARTS], nargs="?", default="all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 100,000 instead of 1,000,000")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--aof", action="store_true", help="leave the server's append-only file on, as runs have it")
    options = parser.parse_args()
    found: dict[str, Any] = {"device": device(), "python": sys.version.split()[0]}
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer() as server:
        url = server.start(Path(folder))
        with redis.Redis.from_url(url) as client:
            found["server"] = f"Redis {client.info('server')['redis_version']}"
            if not options.aof:
                client.config_set("appendonly", "no")
            for part in PARTS if options.part == "all" else (options.part,):
                client.flushall()
                found[part] = _parts(url, quick=options.quick)[part]()
                if not options.json:
                    _print(part, found)
    if options.json:
        print(json.dumps(found, indent=2))
    return 0


def _parts(url: str, *, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "peers": lambda: versus.run(url, rounds=3 if quick else 8),
        "scaling": lambda: alone.scaling(url, large=100_000 if quick else 1_000_000, rounds=5 if quick else 30),
        "prefetching": lambda: alone.prefetching(url, seconds=3 if quick else 20),
        "memory": lambda: alone.memory(url),
        "anatomy": lambda: alone.anatomy(url),
        "dtypes": lambda: dtypes.run(url, rounds=5 if quick else 30),
    }


def _print(part: str, found: dict[str, Any]) -> None:
    print(f"\n{part} ({found['device']}; {found['server']})")
    if part != "peers":
        for name, value in found[part].items():
            print(f"  {name:<55} {value if isinstance(value, dict | str) else format(value, '.4g')}")
        return
    for operation, by_kind in found["peers"]["median_s"].items():
        for kind, seconds in by_kind.items():
            ratio = seconds / by_kind["ours"]
            target = versus.TARGETS.get((operation, kind))
            verdict = "" if target is None else f"target {target}: {'met' if ratio >= target else 'MISSED'}"
            print(f"  {operation} {BATCH}  {kind:<16} {seconds * 1e3:9.2f} ms   {ratio:6.2f} x ours   {verdict}")
    for kind, reason in found["peers"]["missing"].items():
        print(f"  {kind}: not measured: {reason}")


if __name__ == "__main__":
    sys.exit(main())
