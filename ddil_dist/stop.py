"""Ending a running run: `python -m ddil_dist.stop --run NAME`.

Rollout actors drain, the learner saves a checkpoint, and everything that the run started ends, nothing else; in its
final evaluation a run ends before the next batch of images. The same launch goes on. Needs neither Ray nor torch,
except with `--kill`, which ends a run that no longer listens.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ddil_dist.attach import add_arguments, answer, config_of, find_run, living_run
from ddil_dist.control import RunControl
from ddil_dist.errors import EnvironmentFailure, WaitTimeoutError
from ddil_dist.runs import whereabouts
from ddil_dist.status import ask_to_stop, has_process, living_status

LOOK_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 ended, 2 refused, 1 still going at the deadline."""
    options = _parser().parse_args(arguments)

    def stop() -> int:
        path = find_run(options)
        return _kill(options.run) if options.kill else _stop(path, options)

    try:
        return answer(stop)
    except KeyboardInterrupt:
        print("ddil_dist: no longer waiting; the run goes on stopping", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.stop",
        description="End a running run at a checkpoint: drain its actors, save, end everything that it started; or end "
        "its evaluation.",
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


def _stop(path: Path, options: argparse.Namespace) -> int:
    """Ask the run's launcher by a file in its directory, its supervisor in Redis, and wait for those that there are."""
    held = has_process(path)
    if held:
        ask_to_stop(path)
    try:
        control = living_run(path, options)
    except EnvironmentFailure:
        if not held:
            raise
        status, last = living_status(path), ""
        print(f"{path.name}: stopping ({status or 'its start'})", flush=True)
    else:
        with closing(control):
            print(f"{path.name}: stopping at a checkpoint", flush=True)
            control.request_stop("asked to by ddil_dist.stop")
            update = _wait_for_supervisor(control, options.wait, away_s=config_of(path).deadlines.redis_back_s)
        last = "" if update is None else f" after update {update}"
    if held:
        _wait_for_process(path, options.wait)
    print(f"{path.name}: ended{last}; {whereabouts(path) if held else 'the same launch resumes it'}")
    return 0


def _wait_for_supervisor(control: RunControl, wait_s: float, *, away_s: float) -> int | None:
    """Return the learner's last update, as far as it was heard of, once the run's supervisor has ended.

    away_s: a server that has not answered for so long does not come back.
    """
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
            ended = time.monotonic() - reached > away_s
        if ended:
            return update
        if time.monotonic() > deadline:
            raise WaitTimeoutError(
                f"stop waited {wait_s:g} s for run {control.run!r} to end, or its learner to get on; it has been asked "
                "and may still do so; --kill ends it at once, at its last checkpoint"
            )
        time.sleep(LOOK_S)


def _wait_for_process(path: Path, wait_s: float) -> None:
    """Wait until the process that holds the run's directory has ended."""
    deadline = time.monotonic() + wait_s
    before = None
    while has_process(path):
        status = living_status(path)
        if status != before:  # it gets on
            before, deadline = status, time.monotonic() + wait_s
        if time.monotonic() > deadline:
            raise WaitTimeoutError(
                f"stop waited {wait_s:g} s for the process of run {path.name!r} to end, or to get on; it has been "
                "asked and may still do so; Ctrl-C, twice, where it runs ends it at once"
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
