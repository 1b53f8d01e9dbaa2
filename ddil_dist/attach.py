"""How the commands that talk to a running run find it: its name, and its Redis. Imports neither torch nor Ray."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ddil_dist.config import RedisConfig, RunConfig, load_config, parse_config
from ddil_dist.control import RunControl
from ddil_dist.errors import ConfigError, DdilError, EnvironmentFailure
from ddil_dist.replay.server import connect, read_url
from ddil_dist.runs import CONFIG_FILE, FINISHED_FILE, add_run, settle_run, stage_of, whereabouts
from ddil_dist.status import living_status

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a command finds a run that is going on."""
    add_run(parser)
    parser.add_argument(
        "--url",
        action="append",
        help="URL of the run's Redis; repeat it where the run has several. Default: the one that the run was "
        "started with or started itself, as its directory says. A password may also come from DDIL_REDIS_PASSWORD",
    )
    parser.add_argument("--username", help="ACL user")
    parser.add_argument("--password-file", type=Path, help="holds the password")


def find_run(options: argparse.Namespace) -> Path:
    """The directory of the run that is meant: of a curriculum, the stage that it is at. Leaves its name in options."""
    path = stage_of(settle_run(options))
    options.run = path.name
    return path


def config_of(path: Path) -> RunConfig:
    """What the run in `path` was started with; the defaults where that is not to be read here. For its deadlines."""
    try:
        return load_config(path / CONFIG_FILE)
    except ConfigError:
        return RunConfig()


def redis_of(path: Path, options: argparse.Namespace) -> RedisConfig:
    """The Redis of the run in `path`: as the options name it, else as the run was started with, else its own.

    Raises EnvironmentFailure where it has none, ConfigError where the URL is none; neither shows it.
    """
    known = config_of(path).redis
    urls = options.url or list(known.urls)
    if not urls:
        found = read_url(path / "redis")
        if found is None:
            here = (path / FINISHED_FILE).is_file() or living_status(path) is not None
            raise EnvironmentFailure(whereabouts(path) + ("" if here else ". If its Redis is another's, give --url"))
        urls = [found]
    named = {"username": options.username, "password_file": options.password_file}
    settings = known.model_dump() | {key: value for key, value in named.items() if value is not None}
    return parse_config({"redis": {**settings, "url": urls[0], "more_urls": urls[1:]}}).redis


def living_run(path: Path, options: argparse.Namespace) -> RunControl:
    """The control keys of the run in `path` that is going on. Raises EnvironmentFailure where it is not."""
    control = RunControl(connect(redis_of(path, options)), options.run)
    if not control.is_alive():
        known = control.supervisor()
        control.close()
        raise EnvironmentFailure(
            f"no run {options.run!r} is going on at this server"
            + (f": it has {known['state']}" if known.get("state") == "ended" else "")
            + f"; {whereabouts(path)}"
        )
    return control
