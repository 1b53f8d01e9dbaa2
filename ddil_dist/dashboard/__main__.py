"""The command: `python -m ddil_dist.dashboard`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ddil_dist.attach import add_arguments, answer, redis_of
from ddil_dist.errors import ConfigError
from ddil_dist.runs import run_of, settle_run

TOKEN_VARIABLE = "DDIL_DASHBOARD_TOKEN"  # noqa: S105 - the name of it
LEAST_TOKEN_CHARS = 16
LOOPBACK = ("127.0.0.1", "localhost")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C. The exit code: 0 ended, 2 refused before anything began."""
    options = _parser().parse_args(argv)
    return answer(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.dashboard",
        description="Show runs in the browser, while they go on and afterwards. Without a run: all below --directory.",
    )
    add_arguments(parser)
    parser.add_argument("--port", type=int, default=8266, help="to listen on; 0: any free one (default: 8266)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but the loopback wants a token (default: 127.0.0.1)",
    )
    parser.add_argument("--token-file", type=Path, help=f"holds the token; or set {TOKEN_VARIABLE}")
    return parser


def _run(options: argparse.Namespace) -> int:
    if not 0 <= options.port < 65536:
        raise ConfigError(f"--port {options.port}: must be from 0 to 65535")
    token = _token(options.token_file)
    if token is None and options.host not in LOOPBACK:
        raise ConfigError(
            f"--host {options.host}: others could look on; give a token in {TOKEN_VARIABLE} or --token-file, or listen "
            "on 127.0.0.1 and reach it by ssh -L"
        )
    named = bool(options.words or options.run)
    path = run_of(options) if named else settle_run(options)
    if not path.parent.is_dir():
        raise ConfigError(f"--directory {path.parent}: there is no such directory")

    from ddil_dist.dashboard.server import DashboardServer, serve
    from ddil_dist.dashboard.watch import Runs

    server = DashboardServer(
        options.host, options.port, Runs(path.parent, lambda stage: redis_of(stage, options)), token=token
    )
    page = f"/runs/{quote(path.name)}" if named else "/"
    hint = "?token=..." if token else ""
    print(f"http://{options.host}:{server.server_address[1]}{page}{hint}   (Ctrl-C ends it)", flush=True)
    serve(server)
    return 0


def _token(path: Path | None) -> str | None:
    """From the file or the environment; None where neither has one. Raises ConfigError where it is too short."""
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE)
    else:
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {path}: cannot be read ({type(error).__name__})") from None
    if token is not None and (len(token) < LEAST_TOKEN_CHARS or not token.isascii() or not token.isalnum()):
        raise ConfigError(
            f"the dashboard's token must be at least {LEAST_TOKEN_CHARS} letters and digits; "
            "openssl rand -hex 16 makes one"
        )
    return token


if __name__ == "__main__":
    sys.exit(main())
