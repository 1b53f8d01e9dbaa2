"""A real server for the module, and buffers of every kind under one name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ddil_dist.config import RedisConfig, ReplayConfig
from ddil_dist.replay import EmbeddedServer, InMemoryReplay, RedisReplay, ReplayBuffer
from ddil_dist.states import States

MakeReplay = Callable[..., ReplayBuffer]

_runs = count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server that tests share; each uses a run of its own. Tests that hurt a server start their own."""
    with EmbeddedServer() as embedded:
        embedded.start(tmp_path_factory.mktemp("redis"))
        yield embedded


@pytest.fixture
def run_name() -> str:
    return f"test-{next(_runs)}"


@pytest.fixture
def make_redis(server: EmbeddedServer, run_name: str) -> Iterator[Callable[..., RedisReplay]]:
    """Clients of one run on the shared server, closed after the test."""
    with ExitStack() as stack:

        def make(
            config: ReplayConfig, *, seed: int = 0, shards: int = 1, part: int = 0, kind: type[States[Any]] = States
        ) -> RedisReplay:
            redis = RedisConfig(url=server.url, shards=shards)
            replay = RedisReplay(config, redis, run=f"{run_name}-{part}", seed=seed, kind=kind)
            stack.callback(replay.close)
            return replay

        yield make


@pytest.fixture(params=["memory", "redis", "redis-3-shards"])
def make_replay(request: pytest.FixtureRequest) -> MakeReplay:
    """Every backend, by `make_replay(config)`; another `part` is another buffer."""
    if request.param == "memory":
        return lambda config, *, seed=0, part=0, kind=States: InMemoryReplay(config, seed, kind=kind)
    make = request.getfixturevalue("make_redis")
    shards = 3 if request.param == "redis-3-shards" else 1
    return partial(make, shards=shards)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server that the test may hurt."""
    with EmbeddedServer() as embedded:
        embedded.start(tmp_path / "redis")
        yield embedded
