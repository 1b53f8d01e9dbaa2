"""Where runs are, how commands are told of one, and what has become of it. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ddil_dist.errors import ConfigError, EnvironmentFailure
from ddil_dist.locks import LOCK_FILE, is_held
from ddil_dist.status import has_process, living_status, read_status

CONFIG_FILE = "config.yaml"
"""What a run was started with, in its directory."""
FINISHED_FILE = ".finished"
"""Written last, holds the number of updates that the finished run had."""


def base_directory() -> Path:
    """What relative paths are relative to: the working directory.

    A submitted Ray job runs in a copy of the working directory that Ray removes; there it is the home directory.
    """
    here = Path.cwd()
    copied = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and any(
        part.startswith("_ray_pkg_") for part in here.resolve().parts
    )
    return Path.home() if copied else here


def add_run(parser: argparse.ArgumentParser, *, overrides: bool = False) -> None:
    """Add what every command takes a run by; `settle_run` makes options.run and options.directory of it.

    overrides: it takes `key=value` words, too, which become options.overrides.
    """
    words = "RUN key=value" if overrides else "RUN"
    more = "; then keys of its configuration to change" if overrides else ""
    parser.add_argument(
        "words", nargs="*", metavar=words, help=f"the run: its name, or its directory such as runs/demo{more}"
    )
    parser.add_argument("--run", metavar="RUN", help="the same (default: demo)")
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="parent of named runs (default: runs)")
    parser.set_defaults(takes_overrides=overrides)


def settle_run(options: argparse.Namespace) -> Path:
    """The run's directory, after putting its name, its parent and the overrides into `options`.

    Raises ConfigError where several are named.
    """
    named = [word for word in options.words if "=" not in word] + ([options.run] if options.run else [])
    options.overrides = [word for word in options.words if "=" in word]
    if options.overrides and not options.takes_overrides:
        raise ConfigError(f"{options.overrides[0]!r} is no run, and this command takes no keys of the configuration")
    if len(set(named)) > 1:
        raise ConfigError(f"several runs are named ({', '.join(named)}); name one")
    path = Path(named[0] if named else "demo").expanduser()
    if len(path.parts) > 1:
        options.directory = path.parent
    options.run = path.name
    directory: Path = options.directory
    return base_directory() / directory.expanduser() / path.name


def run_of(options: argparse.Namespace) -> Path:
    """The directory of a run that there is. Raises EnvironmentFailure where there is none."""
    path = settle_run(options)
    if not (path / CONFIG_FILE).is_file():
        raise EnvironmentFailure(_never_was(path))
    return path


def _never_was(path: Path) -> str:
    others = sorted(each.parent.name for each in path.parent.glob(f"*/{CONFIG_FILE}"))
    there = f"runs there: {', '.join(others)}" if others else "there is no run there"
    return f"no run {path.name!r} in {path.parent}; {there}. Start one with python -m ddil_dist.launch"


def stage_of(path: Path) -> Path:
    """The directory of the stage that a curriculum in `path` is at; `path` itself for any other run."""
    stages = (lock.parent for lock in path.glob(f"{path.name}_stage_*/{LOCK_FILE}"))
    return next((stage for stage in stages if is_held(stage / LOCK_FILE)), path)


def whereabouts(path: Path) -> str:
    """What has become of a run that no server answers for, from its directory."""
    run = f"run {path.name!r}"
    if not (path / CONFIG_FILE).is_file():
        return _never_was(path)
    if has_process(path):
        status = living_status(path)
        if status is None:
            return f"{run} is starting, or between its training and its evaluation; ask again in a moment"
        return f"{run} has no rollout actors now ({status}); python -m ddil_dist.monitor shows how it gets on"
    if (path / FINISHED_FILE).is_file():
        return f"{run} has finished; its report is {path / 'report.html'}"
    return f"{run} {unfinished(path) or 'has stopped; the same launch resumes it'}"


def unfinished(path: Path) -> str | None:
    """What is missing of a run whose training is finished and whose process is gone, and which command makes it.

    None where the training is not finished, or nothing is missing.
    """
    status = read_status(path)
    if status is None or not status.closes or status.phase == "training":
        return None
    if status.phase == "export":
        return "is trained, but was ended before its student was exported; the same launch does that"
    how = str(status) if status.phase in ("failed", "stopped") else "it was ended during its evaluation"
    return (
        f"is trained, and its student exported, but {how}; python -m ddil_dist.evaluate {path} evaluates it again, as "
        "does the same launch"
    )
