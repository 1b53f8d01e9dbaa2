"""The embedded server and connecting: it lives as long as its run, and errors say what to do."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from ddil_dist.config import RedisConfig
from ddil_dist.errors import EnvironmentFailure
from ddil_dist.replay import EmbeddedServer, RedisReplay, connect
from ddil_dist.replay.server import PASSWORD_VARIABLE, describe, full_url, read_url
from ddil_dist.types import Draw

from .support import make_config, make_states

pytestmark = pytest.mark.integration


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.02)


class TestEmbeddedServer:
    def test_it_listens_on_the_loopback_with_a_password(self, own_server: EmbeddedServer, tmp_path: Path) -> None:
        assert own_server.url is not None
        with connect(own_server.url) as client:
            settings = client.config_get()
            assert settings["bind"] == "127.0.0.1"
            assert (settings["appendonly"], settings["maxmemory-policy"]) == ("yes", "noeviction")
            assert Path(settings["dir"]) == tmp_path / "redis"
        bare = f"redis://{describe(own_server.url)}"
        with pytest.raises(EnvironmentFailure, match=f"refuses this user or password|set {PASSWORD_VARIABLE}"):
            connect(bare)
        for name in ("server.json", "redis.conf"):
            assert stat.S_IMODE((tmp_path / "redis" / name).stat().st_mode) == 0o600

    def test_other_shells_find_it_by_its_directory(self, own_server: EmbeddedServer, tmp_path: Path) -> None:
        assert read_url(tmp_path / "redis") == own_server.url
        own_server.stop()
        assert read_url(tmp_path / "redis") is None

    def test_stopping_leaves_nothing_and_starting_again_finds_the_data(self, tmp_path: Path) -> None:
        server = EmbeddedServer()
        url = server.start(tmp_path)
        pid = server.pid
        assert pid is not None
        replay = RedisReplay(make_config(), url, run="r", seed=0)
        replay.insert(make_states(0, 40), writer="w", batch_id=0, timeout_s=5)
        before = replay.stats()
        replay.close()
        server.stop()
        assert not alive(pid)
        replay = RedisReplay(make_config(), server.start(tmp_path), run="r", seed=0)
        assert replace(replay.stats(), waits_s={}) == replace(before, waits_s={})
        assert not replay.insert(make_states(0, 40), writer="w", batch_id=0, timeout_s=5)
        assert len(replay.sample([Draw(9)], timeout_s=5)) == 9
        replay.close()
        server.stop()

    def test_a_second_server_over_the_directory_is_refused(self, own_server: EmbeddedServer, tmp_path: Path) -> None:
        with pytest.raises(EnvironmentFailure, match=r"already up at 127.0.0.1:\d+ .*choose another run.name"):
            EmbeddedServer().start(tmp_path / "redis")

    def test_it_ends_when_the_run_is_killed(self, tmp_path: Path) -> None:
        script = (
            "import sys, time, pathlib\n"
            "from ddil_dist.replay import EmbeddedServer\n"
            "server = EmbeddedServer()\n"
            "server.start(pathlib.Path(sys.argv[1]))\n"
            "print(server.pid, server._watchdog.pid, flush=True)\n"
            "time.sleep(60)\n"
        )
        run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        server, watchdog = map(int, run.stdout.readline().split())
        assert alive(server)
        assert alive(watchdog)
        run.kill()
        run.wait()
        run.stdout.close()
        wait_until(lambda: not alive(server) and not alive(watchdog))

    @pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
    def test_it_ends_when_its_watchdog_is_killed(self, own_server: EmbeddedServer) -> None:
        pid = own_server.pid
        assert pid is not None
        assert own_server._watchdog is not None
        own_server._watchdog.kill()
        wait_until(lambda: not alive(pid))

    def test_a_crashed_server_is_started_again_with_its_data(self, own_server: EmbeddedServer) -> None:
        assert own_server.url is not None
        replay = RedisReplay(make_config(), own_server.url, run="r", seed=0)
        replay.insert(make_states(0, 40), writer="w", batch_id=0, timeout_s=5)
        replay.sample([Draw(5)], timeout_s=5)
        time.sleep(1.5)  # the append-only file is flushed every second, and the watchdog forgives after one
        first = own_server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        found = replay.sample([Draw(50)], timeout_s=20)
        assert set(found.trajectory_id.tolist()) <= set(range(40))
        assert own_server.pid != first
        assert replay.stats().size == 40
        assert not replay.insert(make_states(0, 40), writer="w", batch_id=0, timeout_s=5)
        replay.close()


class TestConnect:
    def test_a_server_that_would_drop_records_is_refused(self, own_server: EmbeddedServer) -> None:
        with connect(own_server.url) as client:
            client.config_set("maxmemory", "200mb")
            client.config_set("maxmemory-policy", "allkeys-lru")
            with pytest.raises(EnvironmentFailure, match=r"maxmemory-policy 'allkeys-lru': .* set maxmemory-policy"):
                connect(own_server.url)
            client.config_set("maxmemory", 0)  # which never is full
            connect(own_server.url).close()

    def test_an_unreachable_server_is_named(self) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            with pytest.raises(EnvironmentFailure, match=f"127.0.0.1:{port} cannot be reached.*is it running"):
                connect(f"redis://:secret@127.0.0.1:{port}")

    def test_a_wrong_password_is_told_and_not_printed(self, server: EmbeddedServer) -> None:
        assert server.url is not None
        with pytest.raises(EnvironmentFailure, match="refuses this user or password") as caught:
            connect(f"redis://:not-the-password@{describe(server.url)}")
        assert "not-the-password" not in f"{caught.value!r} {caught.value.__cause__!r}"

    def test_a_server_elsewhere_needs_a_password(self) -> None:
        with pytest.raises(EnvironmentFailure, match=r"replay.example:6379 is not on this machine and no password"):
            connect("redis://replay.example")

    def test_the_password_comes_from_a_file_or_the_environment(
        self, server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert server.url is not None
        password = server.url.partition("://:")[2].partition("@")[0]
        bare = f"redis://{describe(server.url)}/0"
        file = tmp_path / "password"
        file.write_text(password + "\n")
        config = RedisConfig(url=bare, password_file=file)
        with connect(config) as client:
            assert client.ping()
        assert full_url(config) == server.url
        monkeypatch.setenv(PASSWORD_VARIABLE, password)
        with connect(bare) as client:
            assert client.ping()
        assert full_url(RedisConfig(url=bare)) == server.url
        monkeypatch.delenv(PASSWORD_VARIABLE)
        with pytest.raises(EnvironmentFailure, match=r"redis.password_file: .*No such file"):
            connect(RedisConfig(url=bare, password_file=tmp_path / "none"))

    def test_an_acl_user_sees_only_what_it_may(self, own_server: EmbeddedServer) -> None:
        assert own_server.url is not None
        with connect(own_server.url) as admin:
            admin.execute_command(
                "ACL", "SETUSER", "ddil", "on", ">pass word/1", "~ddil:*", "+@all", "-@admin", "-@dangerous", "+info"
            )
            admin.execute_command("ACL", "SETUSER", "other", "on", ">x", "~elsewhere:*", "+@all")
        where = describe(own_server.url)
        replay = RedisReplay(make_config(), f"redis://ddil:pass%20word%2F1@{where}", run="r", seed=0)
        assert replay.insert(make_states(0, 4), writer="w", batch_id=0, timeout_s=5)
        assert len(replay.sample([Draw(4)], timeout_s=5)) == 4
        replay.close()
        with pytest.raises(EnvironmentFailure, match="ACL"):
            RedisReplay(make_config(), f"redis://other:x@{where}", run="r", seed=0)

    def test_credentials_are_in_no_repr(self, server: EmbeddedServer) -> None:
        assert server.url is not None
        config = RedisConfig(url=server.url, more_urls=(server.url,))
        password = server.url.partition("://:")[2].partition("@")[0]
        replay = RedisReplay(make_config(), server.url, run="repr", seed=0)
        assert password not in f"{config!r} {config} {replay!r} {replay._view.first.shard!r}"
        replay.close()

    def test_tls_is_asked_for_by_the_scheme(self, server: EmbeddedServer) -> None:
        assert server.url is not None
        with pytest.raises(EnvironmentFailure, match="cannot be reached"):  # this server speaks no TLS
            connect(RedisConfig(url=server.url.replace("redis://", "rediss://"), connect_timeout_s=0.5))


class TestCluster:
    def test_shards_spread_over_the_nodes_of_a_cluster(self, tmp_path: Path) -> None:
        from ddil_dist.replay.server import find_server

        ports, nodes = [], []
        for number in range(2):
            ports.append(_cluster_port())
            folder = tmp_path / str(number)
            folder.mkdir()
            nodes.append(
                subprocess.Popen(
                    [
                        str(find_server()), "--port", str(ports[-1]), "--cluster-enabled", "yes", "--save", "",
                        "--cluster-config-file", "nodes.conf", "--dir", str(folder), "--bind", "127.0.0.1",
                        "--appendonly", "no",
                    ],
                    stdout=subprocess.DEVNULL,
                )
            )  # fmt: skip
        try:
            clients = [redis.Redis(port=port, protocol=2) for port in ports]
            for client in clients:
                wait_until(lambda client=client: _answers(client))  # type: ignore[misc]
            for client, slots in zip(clients, (range(8192), range(8192, 16384)), strict=True):
                client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", ports[1])
            for client in clients:
                wait_until(lambda client=client: b"cluster_state:ok" in _cluster_info(client), 20)  # type: ignore[misc]
                wait_until(lambda client=client: b"cluster_known_nodes:2" in _cluster_info(client), 20)  # type: ignore[misc]
            replay = RedisReplay(
                make_config(), RedisConfig(url=f"redis://127.0.0.1:{ports[0]}", shards=4), run="c", seed=0
            )
            for batch in range(8):
                assert replay.insert(make_states(batch * 5, batch * 5 + 5), writer="w", batch_id=batch, timeout_s=9)
                assert not replay.insert(make_states(0, 5), writer="w", batch_id=batch, timeout_s=9)
            found = replay.sample([Draw(400)], timeout_s=9)
            assert set(found.trajectory_id.tolist()) == set(range(40))
            assert all(client.dbsize() > 0 for client in clients)
            replay.close()
            for client in clients:
                client.close()
        finally:
            for node in nodes:
                node.terminate()
                node.wait()


def _cluster_port() -> int:
    """A free port whose neighbour 10,000 above, the nodes' own channel, is free too."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as one, socket.socket() as two:
            if one.connect_ex(("127.0.0.1", port)) and two.connect_ex(("127.0.0.1", port + 10_000)):
                return port
    raise AssertionError("no free port")


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.ConnectionError:
        return False


def _cluster_info(client: redis.Redis) -> bytes:
    info = client.execute_command("CLUSTER INFO")
    return info if isinstance(info, bytes) else repr(info).replace("': '", ":").encode()
