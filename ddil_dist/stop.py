"""Ending a running run: `python -m ddil_dist.stop --run NAME`.

Rollout actors drain, the learner saves a checkpoint, and everything that the run started ends, nothing else. The same
launch resumes it. Needs neither Ray nor torch, except with `--kill`, which ends a run that no longer listens.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import closing

from ddil_dist.control import RunControl
from ddil_dist.errors import EnvironmentFailure, WaitTimeoutError
from ddil_dist.reach import add_arguments, answer, living_run

LOOK_S = 0.5
AWAY_S = 8.0
"""A server that has not answered for this long does not come back: a watchdog starts a crashed one within seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 ended, 2 refused, 1 still going at the deadline."""
    options = _parser().parse_args(arguments)

    def stop() -> int:
        if options.kill:
            return _kill(options.run)
        with closing(living_run(options)) as control:
            return _stop(control, options.wait)

    try:
        return answer(stop)
    except KeyboardInterrupt:
        print("ddil_dist: no longer waiting; the run goes on stopping", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.stop",
        description="End a running run at a checkpoint: drain its actors, save, end everything that it started.",
        epilog="The same launch resumes the run.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--wait",
        type=float,
        default=240.0,
        metavar="SECONDS",
        help="for the run to end, since its learner was last seen to get on (default: 240)",
    )
    parser.add_argument(
        "--kill",
        action="store_true",
        help="end a run that does not listen, at its last checkpoint; needs its Ray cluster (RAY_ADDRESS, else the "
        "one on this machine)",
    )
    return parser


def _stop(control: RunControl, wait_s: float) -> int:
    control.request_stop("asked to by ddil_dist.stop")
    print(f"{control.run}: stopping at a checkpoint", flush=True)
    deadline = time.monotonic() + wait_s
    update, before, reached = None, None, time.monotonic()
    while True:
        try:
            status = control.learner_status()
            update = status.get("update", update)
            seen = (update, status.get("checkpoint"))
            if seen != before:  # it gets on, if slowly: a large checkpoint takes its time
                before, deadline = seen, time.monotonic() + wait_s
            ended = not control.is_alive()
            reached = time.monotonic()
        except EnvironmentFailure:  # the run's own server ends with the run, last of all; one that crashed comes back
            ended = time.monotonic() - reached > AWAY_S
        if ended:
            last = "" if update is None else f" after update {update}"
            print(f"{control.run}: ended{last}; the same launch resumes it")
            return 0
        if time.monotonic() > deadline:
            raise WaitTimeoutError(
                f"stop waited {wait_s:g} s for run {control.run!r} to end, or its learner to get on; it has been asked "
                "and may still do so; --kill ends it at once, at its last checkpoint"
            )
        time.sleep(LOOK_S)


def _kill(run: str) -> int:
    """End the run's supervisor; Ray ends everything that it started with it."""
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EnvironmentFailure(f"--kill: no Ray cluster is reached: {error}; set RAY_ADDRESS") from error
    from ddil_dist.on_ray import NAMESPACE, actor_name

    try:
        supervisor = ray.get_actor(actor_name(run), namespace=NAMESPACE)
    except ValueError:
        raise EnvironmentFailure(f"--kill: no run {run!r} is going on at this Ray cluster") from None
    ray.kill(supervisor)
    print(f"{run}: killed; the same launch resumes it from its last checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())
