"""How the commands that talk to a running run find it: its name, and its Redis. Imports neither torch nor Ray."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ddil_dist.config import RedisConfig, parse_config
from ddil_dist.control import RunControl
from ddil_dist.errors import ConfigError, DdilError, EnvironmentFailure
from ddil_dist.replay.server import connect, read_url

EXIT_FAILED = 1
EXIT_REFUSED = 2


def answer(command: Callable[[], int]) -> int:
    """Run a command's body; its exit code, with what went wrong said in a line: 2 refused before any work, 1 failed."""
    try:
        return command()
    except (ConfigError, EnvironmentFailure) as error:
        print(f"ddil_dist: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except DdilError as error:
        print(f"ddil_dist: {error}", file=sys.stderr)
        return EXIT_FAILED


def base_directory() -> Path:
    """What relative paths are relative to: the working directory.

    A submitted Ray job runs in a copy of the working directory that Ray removes; there it is the home directory.
    """
    here = Path.cwd()
    copied = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and any(
        part.startswith("_ray_pkg_") for part in here.resolve().parts
    )
    return Path.home() if copied else here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a command finds a run."""
    parser.add_argument("--run", default="demo", help="name of the run (default: demo)")
    parser.add_argument(
        "--url",
        action="append",
        help="URL of the run's Redis; repeat it where the run has several. Default: the server that the run itself "
        "started, found in --directory. A password may also come from DDIL_REDIS_PASSWORD",
    )
    parser.add_argument("--username", help="ACL user")
    parser.add_argument("--password-file", type=Path, help="holds the password")
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="parent of the run's directory")


def redis_of(options: argparse.Namespace) -> RedisConfig:
    """The run's Redis. Raises EnvironmentFailure where neither a URL is given nor a server noted, ConfigError where
    the URL is none; neither shows it."""
    urls = options.url
    if not urls:
        directory = base_directory() / options.directory.expanduser() / options.run / "redis"
        found = read_url(directory)
        if found is None:
            raise EnvironmentFailure(
                f"no Redis server is noted in {directory}: give --url, or --directory and --run of a run that is "
                "going on"
            )
        urls = [found]
    settings = {"url": urls[0], "more_urls": urls[1:], "username": options.username}
    return parse_config({"redis": {**settings, "password_file": options.password_file}}).redis


def living_run(options: argparse.Namespace) -> RunControl:
    """The control keys of a run that is going on. Raises EnvironmentFailure where it is not."""
    config = redis_of(options)
    control = RunControl(connect(config), options.run)
    if not control.is_alive():
        known = control.supervisor()
        control.close()
        raise EnvironmentFailure(
            f"no run {options.run!r} is going on at this server"
            + (f": it has {known['state']}" if known.get("state") == "ended" else "")
            + "; check --run, --url and --directory, or start it with python -m ddil_dist.launch"
        )
    return control
