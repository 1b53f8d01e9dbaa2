"""The command: watch a run in the terminal, as JSON, or for Prometheus."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ddil_dist.attach import add_arguments, answer, config_of, find_run, redis_of
from ddil_dist.errors import ConfigError, EnvironmentFailure
from ddil_dist.runs import whereabouts
from ddil_dist.status import has_process

if TYPE_CHECKING:
    from ddil_dist.monitor.snapshot import Snapshot, Source

WINDOW_S = 10.0
"""Rates and shares are over about this long, so that they do not flicker."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 done, 2 refused (no server, a bad value), 1 failed."""
    options = _parser().parse_args(arguments)
    try:
        return answer(lambda: _run(options))
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # the reader of --watch has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.monitor",
        description="Watch a run: its replay buffer, who waits for whom, its actors, learner and weights.",
    )
    add_arguments(parser)
    parser.add_argument("--interval", type=_seconds, default=1.0, help="seconds between looks (default: 1)")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print one report as JSON, over one interval, and end")
    shape.add_argument("--watch", action="store_true", help="print a report as a line of JSON every interval")
    shape.add_argument("--serve", type=int, metavar="PORT", help="serve /metrics for Prometheus")
    shape.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="change a setting of the running run's rate limiter"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that --serve listens on (default: 127.0.0.1)")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: between 0.05 and 3600 seconds")
    return value


def _run(options: argparse.Namespace) -> int:
    from ddil_dist.monitor.report import compare
    from ddil_dist.monitor.snapshot import Source

    path = find_run(options)
    with closing(Source(path, lambda: redis_of(path, options))) as source:
        if options.set:
            return _change(source, options.set)
        if options.serve is not None:
            return _serve(source, options)
        if options.json:
            before = source.take()
            time.sleep(options.interval)
            print(json.dumps(compare(before, source.take(), options.run), indent=2))
            return 0
        if options.watch:
            for before, after in _windows(source, options.interval):
                print(json.dumps(compare(before, after, options.run)), flush=True)
        else:
            _show(source, options)
        print(f"ddil_dist: {whereabouts(path)}", file=sys.stderr)
        return 0


def _windows(source: Source, interval_s: float) -> Iterator[tuple[Snapshot, Snapshot]]:
    """Every interval, a snapshot and one from about WINDOW_S before; until the run's process ends."""
    history = [source.take()]
    ending_s = config_of(source.path).deadlines.ending_s  # between its training and its evaluation nobody tells of it
    while True:
        watched = has_process(source.path)
        time.sleep(interval_s)
        try:
            history.append(source.take_again(wait_s=ending_s))
        except EnvironmentFailure:
            if watched and not has_process(source.path):
                return
            raise
        while len(history) > 2 and history[1].time < history[-1].time - WINDOW_S:
            history.pop(0)
        yield history[0], history[-1]


def _show(source: Source, options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.live import Live

    from ddil_dist.monitor.report import compare
    from ddil_dist.monitor.screen import Screen

    console = Console()
    first = source.take()
    with Live(
        Screen(compare(first, first, options.run)),
        console=console,
        screen=console.is_terminal,
        auto_refresh=False,
        vertical_overflow="crop",
    ) as live:
        for before, after in _windows(source, options.interval):
            live.update(Screen(compare(before, after, options.run)), refresh=True)


def _serve(source: Source, options: argparse.Namespace) -> int:
    from ddil_dist.monitor.metrics import make_server, render
    from ddil_dist.monitor.report import compare

    before = source.take()

    def scrape() -> str:
        nonlocal before
        after = source.take()
        report = compare(before, after, options.run)
        if after.time - before.time > WINDOW_S:
            before = after
        return render(report, dict(after.replay.waits_s) if after.replay else {})

    with make_server(options.host, options.serve, scrape) as server:
        print(f"metrics of run {options.run}: http://{options.host}:{server.server_address[1]}/metrics", flush=True)
        server.serve_forever(poll_interval=0.2)
    return 0


def _change(source: Source, changes: Sequence[str]) -> int:
    """Change settings and say what they are now."""
    values: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change}: write NAME=VALUE, such as samples_per_insert=4")
        try:
            values[name] = None if text in ("none", "None", "") else float(text)
        except ValueError:
            raise ConfigError(f"--set {change}: {text!r} is not a number or 'none'") from None
        if name in ("min_size", "max_staleness") and values[name] is not None:
            values[name] = int(values[name])
    settings = source.reader.configure(**values)
    for name in settings.__slots__:
        print(f"{name}: {getattr(settings, name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
