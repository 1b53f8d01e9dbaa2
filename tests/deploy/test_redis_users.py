"""The ACL that ships, on a real server: each user can do its own work, and is refused the rest."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from ddil_dist.config import RedisConfig, ReplayConfig
from ddil_dist.control import RunControl
from ddil_dist.errors import DdilError
from ddil_dist.replay import EmbeddedServer, RedisReplay
from ddil_dist.replay.reader import ReplayReader
from ddil_dist.replay.server import connect
from ddil_dist.states import States
from ddil_dist.types import Draw, StateSource

REDIS = Path(__file__).parents[2] / "deploy" / "kubernetes" / "base" / "redis"
USERS = ("run", "operator", "monitor")
ROOM = ReplayConfig(min_size=1)
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RedisConfig]]:
    """The server as each user reaches it, with the buffer of run `r` made by `run`."""
    folder = tmp_path_factory.mktemp("redis")
    secrets = folder / "secrets"
    secrets.mkdir()
    for user in USERS:
        (secrets / user).write_text(f"password-of-{user}\n", encoding="utf-8")
    rendered = folder / "users.acl"
    command = ["sh", str(REDIS / "render-acl.sh"), str(REDIS / "users.acl.template"), str(secrets), str(rendered)]
    subprocess.run(command, check=True, env={"PATH": os.environ["PATH"]})
    with EmbeddedServer() as server:
        url = server.start(folder / "server")
        with redis.Redis.from_url(url) as admin:
            for line in rendered.read_text(encoding="utf-8").splitlines():
                _, name, *rules = line.split()
                if name != "default":  # it is the test's own way in
                    admin.execute_command("ACL", "SETUSER", name, "reset", *rules)
        plain = f"redis://127.0.0.1:{url.rpartition(':')[2]}"
        reached = {user: RedisConfig(url=plain, username=user, password_file=secrets / user) for user in USERS}
        RedisReplay(ROOM, reached["run"], run="r", seed=0).close()
        yield reached


def _states(num: int = 4) -> States[np.ndarray]:
    columns = {
        "source": [StateSource.STUDENT] * num,
        "timestep": [749] * num,
        "policy_version": [1] * num,
        "step_index": [1] * num,
        "guidance_scale": [3.0] * num,
        "prompt": ["a red hat"] * num,
    }
    return States.of(columns, x_t=np.zeros((num, 4, 8, 8), np.float32))


def _control(config: RedisConfig) -> RunControl:
    return RunControl(connect(config), "r")


def test_the_monitor_reads_and_changes_nothing(servers: dict[str, RedisConfig]) -> None:
    reader = ReplayReader(servers["monitor"], "r")
    stats = reader.stats()
    assert stats is not None
    assert stats.capacity == ROOM.capacity
    with pytest.raises(DdilError):
        reader.configure(min_size=2)
    connect(servers["run"]).hset(  # one that is long gone, which a reader may not remove
        "ddil:{r}:control:heartbeats", "actor-9", '{"time": 1}'
    )
    control = _control(servers["monitor"])
    assert control.heartbeats() == {}
    assert control.stop_reason() is None
    with pytest.raises(DdilError, match="cannot answer"):
        control.set_wanted_actors(2)


def test_an_operator_scales_stops_and_sets(servers: dict[str, RedisConfig]) -> None:
    assert ReplayReader(servers["operator"], "r").configure(samples_per_insert=5).samples_per_insert == 5
    control = _control(servers["operator"])
    control.set_wanted_actors(3)
    control.set_autoscale((1, 4))
    control.request_stop()
    assert _control(servers["monitor"]).autoscale() == (1, 4)
    control.clear_stop()
    with pytest.raises(DdilError):
        RedisReplay(ROOM, servers["operator"], run="r", seed=3).insert(_states(), writer="o", batch_id=0, timeout_s=1)


@pytest.mark.parametrize("user", USERS)
def test_nobody_administers_or_leaves_the_runs_keys(servers: dict[str, RedisConfig], user: str) -> None:
    client = connect(servers[user])
    for command in (("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("ACL", "LIST"), ("GET", "another")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)


def test_a_run_does_all_its_work_as_one_user(servers: dict[str, RedisConfig]) -> None:
    replay = RedisReplay(ROOM, servers["run"], run="whole", seed=0)
    assert replay.insert(_states(), writer="w", batch_id=0, timeout_s=5)
    assert len(replay.sample([Draw(2)], timeout_s=5)) == 2
    control = RunControl(connect(servers["run"]), "whole")
    control.set_supervisor({"state": "running"}, alive_s=5)
    assert control.is_alive()
    assert control.next_incarnation("actor-0") == 1
    control.tell("news")
    assert control.take_news() == ["news"]
    control.forget("actor-0")
    control.forget_failures()


def test_without_a_user_nothing_is_answered() -> None:
    lines = (REDIS / "users.acl.template").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "user default off"
    assert [line.split()[1] for line in lines[1:]] == list(USERS)
