"""Where runs are, how commands are told of one, and what has become of it. Imports nothing heavy."""

from __future__ import annotations

import argparse
import fcntl
import os
from pathlib import Path

from ddil_dist.errors import ConfigError, EnvironmentFailure

CONFIG_FILE = "config.yaml"
"""What a run was started with, in its directory."""
LOCK_FILE = ".lock"
"""Held by the launcher."""
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


def whereabouts(path: Path) -> str:
    """What has become of a run that no server answers for, from its directory."""
    if not (path / CONFIG_FILE).is_file():
        return _never_was(path)
    if (path / FINISHED_FILE).is_file():
        return f"run {path.name!r} has finished; its report is {path / 'report.html'}"
    if _is_held(path / LOCK_FILE):
        return (
            f"run {path.name!r} is starting, or is trained and being exported and evaluated, where there is nothing to "
            "scale; Ctrl-C in its launcher stops it, and the same launch ends it"
        )
    return f"run {path.name!r} has stopped; the same launch resumes it"


def _is_held(path: Path) -> bool:
    """Whether a launcher of this machine holds the run's lock."""
    try:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
