"""One shard of the buffer on a Redis server: its keys, its scripts, and exchanges that survive a server's troubles.

An exchange sends packed commands to one or more shards at once and reads all answers. While a server is away, loading
or full it is repeated with back-off until the deadline; everything sent here may be repeated: an insert is known by its
writer and number, a charge by a name of its own. An error at the deadline names the server and the remedy, never its
credentials.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import redis
from redis.cluster import RedisCluster

from ddil_dist.config import RedisConfig
from ddil_dist.errors import EnvironmentFailure, ReplayError, ReplayFullError, WaitTimeoutError
from ddil_dist.replay.codec import Codec
from ddil_dist.replay.scripts import SCRIPTS, script
from ddil_dist.replay.server import connect, describe
from ddil_dist.replay.waits import Deadline

KEYS: Final = (
    "state",
    "data",
    "meta",
    "log",
    "counts",
    "writers",
    "writers-before",
    "clients",
    "origins",
    "used",
    "fates",
)
NUM_CONNECTIONS: Final = 64
LEAST_TIMEOUT_S: Final = 0.5
"""An exchange may pass its deadline by this much rather than give a server no time to answer."""

_AWAY: Final = ("LOADING", "BUSY", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "MOVED", "ASK", "NOREPLICAS")
_READONLY: Final = "READONLY"
"""Somewhere in the answer: of a script that met it, it is wrapped in other words."""
_REFUSED: Final = ("NOAUTH", "WRONGPASS", "NOPERM")


def pack(*args: bytes | str | int) -> bytes:
    """A command in Redis's protocol."""
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        data = arg if isinstance(arg, bytes) else str(arg).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def pairs(flat: Sequence[bytes]) -> dict[str, str]:
    """A hash as the server sends it: name, value, name, value."""
    return {k.decode(): v.decode() for k, v in zip(flat[::2], flat[1::2], strict=True)}


class Shard:
    """Connections to the server of one shard, and what its keys are called.

    prefix    of its keys; the braces in it keep them on one node of a Redis Cluster.
    where     host and port, for messages.
    meta      of the records that it holds, `Codec.meta_dtype`.
    answer_timeout_s   for the server to answer once.
    """

    def __init__(self, client: Any, prefix: str, where: str, meta: np.dtype[Any], *, answer_timeout_s: float) -> None:
        self.answer_timeout_s = answer_timeout_s
        self.where = where
        self.meta = meta
        self.prefix = prefix
        self.keys = tuple(f"{prefix}{name}".encode() for name in KEYS)
        self._client = client
        self._free: list[Any] = []
        self._lock = threading.Lock()
        self.epoch = 0
        """Rises when a connection broke: the server may have restarted and lost its last second."""

    def call(self, name: str, *args: bytes | str | int, keys: Sequence[bytes] | None = None) -> bytes:
        """A packed call of a script with the shard's keys."""
        keys = self.keys if keys is None else keys
        return pack(b"EVALSHA", self.digest(name), len(keys), *keys, *args)

    def digest(self, name: str) -> bytes:
        """A script as the server knows it."""
        return script(name, self.meta)[0]

    def borrow(self) -> Any:
        """A connection of the caller's own until `give_back`."""
        with self._lock:
            if self._free:
                return self._free.pop()
        client: Any = self._client
        if isinstance(client, RedisCluster):
            client = _node_client(client, self.keys[0])
        connection = client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
        connection.connect()
        return connection

    def give_back(self, connection: Any, *, broken: bool = False) -> None:
        """Return a connection; a broken one is closed, and the others too, as they will be broken as well."""
        with self._lock:
            if not broken and len(self._free) < NUM_CONNECTIONS:
                self._free.append(connection)
                return
            stale = [connection, *self._free] if broken else [connection]
            if broken:
                self._free = []
                self.epoch += 1
        for one in stale:
            one.disconnect()

    def moved(self) -> None:
        """Learn anew which node of a cluster serves the keys."""
        if isinstance(self._client, RedisCluster):
            self._client.nodes_manager.initialize()

    def used_memory(self) -> str:
        """What the server says of its memory, for a message."""
        try:
            info = self._client.info("memory")
        except (redis.exceptions.RedisError, OSError):
            return "its memory is full"
        if "used_memory" not in info:
            return "its memory is full"
        return f"it uses {info['used_memory']} of maxmemory {info.get('maxmemory', '?')} bytes"

    def close(self) -> None:
        """Close every connection."""
        with self._lock:
            free, self._free = self._free, []
        for connection in free:
            connection.disconnect()
        self._client.close()


def _node_client(cluster: Any, key: bytes) -> Any:
    """The client of the cluster's node that serves a key."""
    node = cluster.get_node_from_key(key.decode())
    if node is None:
        raise redis.exceptions.ConnectionError("no node serves the shard's keys")
    return cluster.get_redis_connection(node)


def open_shards(config: RedisConfig, run: str, *, shards: int | None = None, codec: Codec | None = None) -> list[Shard]:
    """Every shard of a run, in the order that all clients share: by server, then by hash tag.

    shards: at each server; default: the configuration's. codec: of the records; default: that of `States`.
    """
    meta = (codec or Codec()).meta_dtype
    opened: list[Shard] = []
    for url in config.urls or (None,):
        client = connect(config, url=url)
        for _ in range(config.shards if shards is None else shards):
            prefix = f"ddil:{{{run}:{len(opened)}}}:replay:"
            opened.append(Shard(client, prefix, describe(url or ""), meta, answer_timeout_s=config.answer_timeout_s))
    return opened


def read_answers(connection: Any, num: int) -> list[Any]:
    """The next `num` answers. One that is an error is raised after the others were read."""
    answers, error = [], None
    for _ in range(num):
        try:
            answers.append(connection.read_response(disable_decoding=True, disconnect_on_error=False))
        except redis.exceptions.ResponseError as problem:
            error = error or problem
    if error is not None:
        raise error
    return answers


Account = Callable[[str, str, float], None]

Request = tuple[Shard, bytes, "int | Callable[[Any], list[Any]]"]
"""A shard, packed commands, and how many answers they have, or what reads them from the connection."""


def exchange(
    requests: Sequence[Request],
    deadline: Deadline,
    *,
    who: str,
    account: Account | None = None,
) -> list[list[Any]]:
    """Send to all shards, then read each one's answers: a list for every request.

    Repeats while a server is away or full. Raises WaitTimeoutError or ReplayFullError at the deadline,
    EnvironmentFailure where the server refuses the user, ReplayError for an answer that is a bug.
    account: told who waited, for whom ("server" or "memory") and for how many seconds.
    """
    while True:
        begin_s = deadline.waited_s
        try:
            return _exchange_once(requests, deadline)
        except _Away as away:
            problem = away
        more = deadline.pause(slowly=problem.full)
        if account is not None:
            account(who, problem.whom, deadline.waited_s - begin_s)
        if not more:
            raise problem.at_deadline(who, deadline)


class _Away(Exception):  # noqa: N818
    """A server cannot answer now, but may soon."""

    def __init__(self, shard: Shard, reason: str, *, full: bool = False, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.shard, self.reason, self.full, self.remedy = shard, reason, full, remedy
        self.whom = "memory" if full else "server"

    def at_deadline(self, who: str, deadline: Deadline) -> WaitTimeoutError:
        """The error for a wait that ended without an answer."""
        if self.full and self.remedy is not None:
            return ReplayFullError(
                f"{who} waited {deadline.waited_s:.1f} s for the replay server {self.shard.where}: {self.reason}; "
                f"{self.remedy}"
            )
        if self.full:
            return ReplayFullError(
                f"{who} waited {deadline.waited_s:.1f} s for room on the replay server {self.shard.where}: "
                f"{self.shard.used_memory()}; raise the server's maxmemory or lower replay.capacity_bytes"
            )
        return WaitTimeoutError(
            f"{who} waited {deadline.waited_s:.1f} s for the replay server {self.shard.where} ({self.reason}); "
            "is it running? Start it again, and the run goes on"
        )


def _exchange_once(requests: Sequence[Request], deadline: Deadline) -> list[list[Any]]:
    used: list[tuple[Shard, Any]] = []
    answers: list[list[Any]] = []
    refused: tuple[Shard, redis.exceptions.ResponseError] | None = None
    shard = requests[0][0]
    whole = False
    replica = False
    try:
        for shard, packed, _ in requests:
            connection = shard.borrow()
            used.append((shard, connection))
            connection._sock.settimeout(max(LEAST_TIMEOUT_S, min(shard.answer_timeout_s, deadline.left_s)))
            connection.send_packed_command([packed])
        for (shard, connection), (_, _, read) in zip(used, requests, strict=True):
            try:
                answers.append(read_answers(connection, read) if isinstance(read, int) else read(connection))
            except redis.exceptions.ResponseError as error:
                refused = (shard, error)
                replica = replica or _READONLY in str(error)
        whole = not replica  # its name may lead to another server by now
    except redis.exceptions.AuthenticationError:
        raise EnvironmentFailure(f"replay server {shard.where} refuses this user or password") from None
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
        raise _Away(shard, type(error).__name__) from None
    finally:
        for one, connection in used:
            one.give_back(connection, broken=not whole)
    if refused is not None:
        _judge(*refused)
    return answers


def _judge(shard: Shard, error: redis.exceptions.ResponseError) -> None:
    """Raise what an error answer means: wait (_Away), the user's business, or a bug."""
    text = str(error)
    if "NOSCRIPT" in text or "No matching script" in text:
        _load_scripts(shard)
        raise _Away(shard, "its scripts were lost")
    if isinstance(error, redis.exceptions.OutOfMemoryError) or "OOM" in text or "used memory" in text:
        raise _Away(shard, "full", full=True)
    if "MISCONF" in text:
        remedy = "make room on its disk, or mend what keeps it from writing there"
        raise _Away(shard, f"it takes no writes, as it cannot save its data: {text}", full=True, remedy=remedy)
    if isinstance(error, redis.exceptions.MovedError | redis.exceptions.AskError):
        shard.moved()
        raise _Away(shard, "the cluster moves the shard")
    if _READONLY in text:
        raise _Away(shard, f"{_READONLY}: it is a replica")
    if isinstance(error, redis.exceptions.ClusterError) or text.startswith(_AWAY):
        raise _Away(shard, text)
    if isinstance(error, redis.exceptions.NoPermissionError) or text.startswith(_REFUSED):
        raise EnvironmentFailure(f"replay server {shard.where} refuses: {text}; check the ACL of the user")
    raise ReplayError(f"replay server {shard.where} answers {text!r}") from error


def _load_scripts(shard: Shard) -> None:
    connection = shard.borrow()
    broken = True
    try:
        for name in SCRIPTS:
            connection.send_packed_command([pack(b"SCRIPT", b"LOAD", script(name, shard.meta)[1])])
        read_answers(connection, len(SCRIPTS))
        broken = False
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
        raise _Away(shard, type(error).__name__) from None
    finally:
        shard.give_back(connection, broken=broken)
