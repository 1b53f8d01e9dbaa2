"""`execution: ray`: an embedded or given Redis, a local or given Ray, the fleet, the learner, and their orderly end."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console

from ddil_dist.config import RedisConfig, RunConfig
from ddil_dist.control import RunControl
from ddil_dist.errors import ConfigError, DdilError, EnvironmentFailure
from ddil_dist.journal import EVENTS_FILE, Journal
from ddil_dist.launch.observe import FleetObserver, replay_fields
from ddil_dist.launch.plan import required_resources
from ddil_dist.launch.progress import Progress, ProgressView
from ddil_dist.launch.signals import stop_on_signals
from ddil_dist.replay.redis import RedisReplay
from ddil_dist.replay.server import EmbeddedServer, connect, full_url

LOOK_S = 0.5
JOURNAL_S = 2.0
RESOURCES_S = 10.0
DRAIN_S = 40.0
LEARNER_STOP_S = 120.0


def run_cluster(config: RunConfig) -> bool:
    """Train the run to its end; False if it was stopped before. Leaves nothing running that it started."""
    console = Console()
    with ExitStack() as stack:
        begun = time.monotonic()
        events = Journal(config.run.path / EVENTS_FILE)
        config = config.model_copy(update={"redis": stack.enter_context(_replay_server(config))})
        control = RunControl(connect(config.redis), config.run.name)
        stack.callback(control.close)
        replay = RedisReplay(config.replay, config.redis, run=config.run.name, seed=0)
        stack.callback(replay.close)
        replay.configure(
            samples_per_insert=config.replay.samples_per_insert,
            min_size=config.replay.min_size,
            error_buffer=config.replay.error_buffer,
            max_staleness=config.replay.max_staleness,
        )
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(_ray_session(config))
        control.clear_stop()
        for actor in control.heartbeats():
            control.forget(actor)  # of an earlier life of the run
        control.set_wanted_actors(config.rollout.actors)
        control.set_learner_status({"phase": "starting"})
        learner = stack.enter_context(_started(config))
        events.write("phase", name="start-up", seconds=time.monotonic() - begun)
        training = time.monotonic()
        _Watch(config, control, replay, events, console).until_done(learner, stop)
        events.write("phase", name="training", seconds=time.monotonic() - training)
        return _outcome(learner, control)


class _LearnerThread(threading.Thread):
    """`TorchTrainer.fit` beside the main thread, which keeps signals and the screen."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="learner", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # handed to the main thread, which raises it
            self.error = error


@contextmanager
def _replay_server(config: RunConfig) -> Iterator[RedisConfig]:
    """How to reach the run's Redis, password included: the configured server, or one that ends with this block."""
    if config.redis.url is not None:
        connect(config.redis).close()
        yield _with_credentials(config.redis)
        return
    with EmbeddedServer() as server:
        url = server.start(config.run.path / "redis")
        yield config.redis.model_copy(update={"url": url})


def _with_credentials(redis: RedisConfig) -> RedisConfig:
    """The servers with the password in their URLs, for processes that see neither our files nor our environment."""
    urls = [full_url(redis.model_copy(update={"url": url})) for url in redis.urls]
    return redis.model_copy(update={"url": urls[0], "more_urls": tuple(urls[1:]), "password_file": None})


@contextmanager
def _ray_session(config: RunConfig) -> Iterator[None]:
    """Ray, local or at RAY_ADDRESS, with room for the run. Raises EnvironmentFailure if there is none."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
    import ray

    needed = required_resources(config)
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            cpus = max(os.cpu_count() or 1, round(needed.get("CPU", 0) + 0.5))
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        raise EnvironmentFailure(f"cannot start or reach {where}: {error}") from error
    try:
        _check_nodes(config, ray)
        _check_resources(needed, ray)
        yield
    finally:
        ray.shutdown()


def _check_nodes(config: RunConfig, ray: Any) -> None:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1 and config.redis.url is None:
        raise ConfigError(
            f"redis.url: not set, but the cluster has {len(nodes)} nodes, which cannot reach an embedded server on "
            "this node's loopback; start a Redis with a password and give its URL"
        )


def _check_resources(needed: Mapping[str, float], ray: Any) -> None:
    deadline = time.monotonic() + RESOURCES_S
    while True:
        free = ray.available_resources()
        short = {name: amount for name, amount in needed.items() if free.get(name, 0) < amount}
        if not short:
            return
        if time.monotonic() > deadline:
            total = ray.cluster_resources()
            lines = [
                f"{name}: the run needs {amount:g}, the cluster has {total.get(name, 0):g} of which "
                f"{free.get(name, 0):g} free"
                for name, amount in short.items()
            ]
            raise EnvironmentFailure(
                "no free resources on the cluster; "
                + "; ".join(lines)
                + "; lower rollout.actors, rollout.num_cpus or learner.workers, or wait for other jobs (ray status)"
            )
        time.sleep(LOOK_S)


@contextmanager
def _started(config: RunConfig) -> Iterator[_LearnerThread]:
    """The weight board, the fleet and the learner, running; drained and ended on the way out."""
    import ray

    from actors.fleet import start_fleet
    from actors.worker import FleetSpec
    from ddil_dist.weights.ray_store import start_board
    from learner.worker import create_ray_trainer

    board = start_board(config.run.name)
    fleet = start_fleet(FleetSpec(config=config, board=board))
    learner = _LearnerThread(create_ray_trainer(config, board=board))
    learner.start()
    try:
        yield learner
    finally:
        try:
            ray.get(fleet.drain.remote(), timeout=DRAIN_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            print(f"ddil_dist: the rollout fleet did not drain in {DRAIN_S:g} s and was ended: {error}")
        for actor in (fleet, board):
            ray.kill(actor)


class _Watch:
    """Follows a running learner: shows progress, writes the journal, passes on a request to stop."""

    def __init__(
        self, config: RunConfig, control: RunControl, replay: RedisReplay, events: Journal, console: Console
    ) -> None:
        self._config = config
        self._control = control
        self._events = events
        self._console = console
        self._replay = replay
        self._fleet = FleetObserver(events)
        self._next_line = 0.0

    def until_done(self, learner: _LearnerThread, stop: threading.Event) -> None:
        """Returns when the learner has ended. Raises WaitTimeoutError-like failure if it ignores a stop."""
        asked: float | None = None
        with ProgressView(self._config, self._console) as view:
            while learner.is_alive():
                if stop.is_set() and asked is None:
                    self._control.request_stop()
                    asked = time.monotonic()
                if asked is not None and time.monotonic() - asked > LEARNER_STOP_S:
                    raise DdilError(
                        f"the learner did not stop within {LEARNER_STOP_S:g} s of being asked; the run was ended at "
                        "its last checkpoint"
                    )
                self._look(view)
                learner.join(LOOK_S)
            self._next_line = 0.0  # how it ended is written down whenever the last line was
            self._look(view)

    def _look(self, view: ProgressView) -> None:
        status = self._control.learner_status()
        stats = self._replay.stats()
        beats = self._control.heartbeats()
        view.show(
            Progress(
                phase=str(status.get("phase", "starting")),
                update=int(status.get("update", 0)),
                loss=status.get("loss"),
                replay_size=stats.size,
                num_inserted=stats.num_inserted,
                actors=sum("failed" not in beat for beat in beats.values()),
                learner_wait_share=status.get("wait_share"),
            )
        )
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + JOURNAL_S
            self._events.write("replay", **replay_fields(stats))
        for failure in self._fleet.look(beats):
            self._console.print(f"ddil_dist: {failure}", highlight=False, markup=False)


def _outcome(learner: _LearnerThread, control: RunControl) -> bool:
    status = control.learner_status()
    if status.get("phase") == "failed":
        raise DdilError(f"the learner failed: {status['error']}")
    if learner.error is not None:
        raise DdilError(f"the learner failed: {learner.error}") from learner.error
    return status.get("phase") == "finished"
