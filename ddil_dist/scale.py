"""Changing the number of rollout actors of a running run: `python -m ddil_dist.scale --run NAME --rollouts 8`.

The wanted number lives in the run's Redis; the fleet's manager reconciles to it within a second, and the learner does
not notice. Works from any shell that reaches the server, also as a Ray job; needs neither Ray nor torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing

from ddil_dist.attach import add_arguments, answer, find_run, living_run
from ddil_dist.control import RunControl
from ddil_dist.errors import ConfigError

LOOK_S = 0.5
MOST = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 as wanted, 2 refused, 1 not reached before the deadline."""
    options = _parser().parse_args(arguments)

    def scale() -> int:
        with closing(living_run(find_run(options), options)) as control:
            return _scale(control, options)

    try:
        return answer(scale)
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.scale",
        description="Change how many rollout actors a running run has. Without --rollouts and --auto: say how many.",
        epilog="examples: --run demo --rollouts 8 | --run demo --rollouts 0 (pause) | --run demo --auto 1 16",
    )
    add_arguments(parser)
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("--rollouts", type=_count, metavar="N", help="rollout actors wanted; 0 pauses; ends autoscaling")
    wish.add_argument(
        "--auto", type=_count, nargs=2, metavar=("MIN", "MAX"), help="as many as keep the learner from waiting"
    )
    parser.add_argument(
        "--wait", type=float, default=60.0, metavar="SECONDS", help="for the fleet to get there (default: 60)"
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text}: between 0 and {MOST}")
    return value


def _scale(control: RunControl, options: argparse.Namespace) -> int:
    before = control.wanted_actors()
    if options.auto is not None:
        least, most = options.auto
        if not 1 <= least <= most:
            raise ConfigError(f"--auto {least} {most}: MIN must be at least 1 and not exceed MAX")
        control.set_autoscale((least, most))
        control.set_wanted_actors(min(most, max(least, before or 0)))
        print(f"{control.run}: {least} to {most} rollout actors, as many as keep the learner from waiting")
        return 0
    if options.rollouts is None:
        print(f"{control.run}: {_describe(control)}")
        return 0
    control.set_autoscale(None)
    control.set_wanted_actors(options.rollouts)
    print(f"{control.run}: {options.rollouts} rollout actors wanted, {before or 0} before", flush=True)
    return _follow(control, options.rollouts, options.wait)


def _follow(control: RunControl, wanted: int, wait_s: float) -> int:
    """Tell of the fleet until it has as many actors as wanted, or the deadline has passed."""
    deadline = time.monotonic() + wait_s
    said = ""
    while True:
        fleet = control.fleet()
        now = _describe(control)
        if now != said and fleet.get("wanted") == wanted:
            said = now
            print(f"{control.run}: {now}", flush=True)
            if fleet.get("lacking"):
                print(f"{control.run}: the cluster has no room for more: {fleet['lacking']}", flush=True)
        if fleet.get("wanted") == wanted and fleet["running"] == wanted and not fleet["stopping"]:
            return 0
        if time.monotonic() > deadline:
            why = (
                "some wait for a place: no node has the resources and labels that an actor asks for "
                f"({fleet.get('lacking') or 'see ray status'})"
                if fleet.get("waiting_for_a_place")
                else "look at python -m ddil_dist.monitor for what holds them up"
            )
            print(f"ddil_dist: not there after {wait_s:g} s; {why}. The fleet goes on trying", file=sys.stderr)
            return 1
        time.sleep(LOOK_S)


def _describe(control: RunControl) -> str:
    fleet, bounds = control.fleet(), control.autoscale()
    if not fleet:
        return "its fleet has not begun"
    parts = [f"{fleet['running']} of {fleet['wanted']} rollout actors run"]
    parts += [
        f"{fleet[key]} {words}"
        for key, words in (
            ("waiting_for_a_place", "wait for a place"),
            ("backing_off", "failed and are tried again"),
            ("stopping", "are stopping"),
        )
        if fleet[key]
    ]
    if bounds is not None:
        parts.append(f"autoscaled from {bounds[0]} to {bounds[1]}")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
