"""The root of a run on Ray: a detached actor that owns the replay server, the weight board, the fleet and the learner.

The launcher starts it and watches it, and may die: the run goes on, and the next launch of the same run finds it by
its name and watches it again. Everything that the run starts is a child of the supervisor, so Ray ends it all with
the supervisor and touches nothing else. Ray starts a supervisor that died again; the run then goes on from its last
checkpoint. It ends by itself once the run has ended and the launcher, if there is one, has heard how.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray

from actors.fleet import start_fleet
from actors.worker import FleetSpec
from ddil_dist.config import RedisConfig, RunConfig
from ddil_dist.control import RunControl
from ddil_dist.errors import DdilError
from ddil_dist.journal import EVENTS_FILE, Journal
from ddil_dist.launch.identity import RunIdentity
from ddil_dist.launch.progress import Progress
from ddil_dist.launch.replay_journal import FleetJournal, replay_fields
from ddil_dist.locks import TRAINING_LOCK, hold_lock
from ddil_dist.on_ray import NAMESPACE, actor_name, drop_stranded_coordinator, free_placement_group, on_this_node
from ddil_dist.replay.redis_replay import RedisReplay
from ddil_dist.replay.server import EmbeddedServer, connect, full_url
from ddil_dist.weights.ray_store import start_board
from learner.worker import Outcome, create_ray_trainer

LOOK_S = 0.5
JOURNAL_S = 2.0
REMINDER_S = 60.0

ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who is lent no GPU sees none, and computes on the CPU
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}
"""What Ray reads in the processes of a run."""


@dataclass(frozen=True)
class View:
    """A look at the run from outside.

    progress    for people.
    news        sentences since the last look: failures, and what was done about them.
    ended       whether everything that the run started has ended.
    finished    whether the learner reached its last update.
    error       why the run failed; None where it did not.
    """

    progress: Progress
    news: list[str]
    ended: bool
    finished: bool
    error: str | None


class RunSupervisor:
    """Runs as a detached Ray actor; its work is in a thread of its own, so that every call answers at once."""

    def __init__(self, config: RunConfig, identity: RunIdentity) -> None:
        self._config = config
        self._identity = identity
        self._stop_reason: str | None = None
        self._failure: str | None = None
        self._progress = Progress(phase="starting")
        self._news: list[str] = []
        self._ended = self._finished = False
        self._error: str | None = None
        self._looked = time.monotonic()
        self._self = ray.get_runtime_context().current_actor
        threading.Thread(target=self._run, name="run", daemon=True).start()

    def identity(self) -> RunIdentity:
        """What runs here."""
        return self._identity

    def look(self) -> View:
        """How the run is doing; news are told once."""
        self._looked = time.monotonic()
        news, self._news = self._news, []
        return View(self._progress, news, self._ended, self._finished, self._error)

    def stop(self, reason: str) -> None:
        """Let the learner save a checkpoint and end everything; `look` tells when that is done."""
        self._stop_reason = reason

    def is_asked_to_stop(self) -> bool:
        """Whether `stop` was called: for a learner that cannot read it in Redis."""
        return self._stop_reason is not None

    def learner_failed(self, reason: str) -> None:
        """A learner's worker cannot go on; the run ends."""
        self._failure = self._failure or reason

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                self._train(stack)
        except Exception as error:  # told to whoever launched the run, whatever it is
            logging.getLogger(__name__).exception("the run failed")
            self._error = str(error) if isinstance(error, DdilError) else f"{type(error).__name__}: {error}"
        self._ended = True
        while time.monotonic() - self._looked < self._config.deadlines.launcher_s:
            time.sleep(LOOK_S)
        ray.kill(self._self)  # nobody looks any more

    def _train(self, stack: ExitStack) -> None:
        begun = time.monotonic()
        stack.enter_context(
            hold_lock(self._config.run.path, TRAINING_LOCK, timeout_s=self._config.deadlines.predecessor_s)
        )
        config = self._config.model_copy(update={"redis": stack.enter_context(_replay_server(self._config))})
        control = RunControl(connect(config.redis), config.run.name)
        stack.callback(control.close)
        stack.callback(self._say_ended, control)
        replay = RedisReplay(config.replay, config.redis, run=config.run.name, seed=0)
        stack.callback(replay.close)
        self._prepare(control, replay)
        events = Journal(config.run.path / EVENTS_FILE)
        learner = stack.enter_context(_started(config, self._self, self._tell))
        events.write("phase", name="start-up", seconds=time.monotonic() - begun)
        training = time.monotonic()
        self._tend_until_done(learner, control, replay, events)
        events.write("phase", name="training", seconds=time.monotonic() - training)
        self._finished = self._outcome(learner, control)

    def _prepare(self, control: RunControl, replay: RedisReplay) -> None:
        """Settle the run's keys. What people changed on a running run outlives its supervisor."""
        again = ray.get_runtime_context().was_current_actor_reconstructed
        if not again:
            control.clear_stop()
            control.forget_failures()
        else:
            free_placement_group(control.learner_place())
        _configure(replay, self._config)
        replay.forget_weights()  # the board is this supervisor's, and empty
        for actor in control.heartbeats():
            control.forget(actor)  # of an earlier life of the run
        if not again or control.wanted_actors() is None:
            _settle_fleet(control, self._config)
        self._beat(control, {"state": "starting"})
        control.set_learner_status({"phase": "starting"})

    def _tend_until_done(
        self, learner: _LearnerThread, control: RunControl, replay: RedisReplay, events: Journal
    ) -> None:
        """Look, write down, pass on a request to stop. Raises DdilError where the learner ignores it."""
        fleet, limits = FleetJournal(events), self._config.deadlines
        begun = time.monotonic()
        next_reminder = begun + REMINDER_S
        asked: float | None = None
        next_line = 0.0
        incarnation = replay.stats().incarnation
        away_since: float | None = None
        while True:
            alive = learner.is_alive()
            try:
                if self._stop_reason is not None and not control.stop_requested():
                    control.request_stop(self._stop_reason)
                stopping = control.stop_requested()
                self._beat(control, {"state": "stopping" if stopping else "running", "pid": os.getpid()})
                asked = asked or (time.monotonic() if stopping else None)
                stats = replay.stats()
                if stats.incarnation != incarnation:  # the server came back empty
                    incarnation = stats.incarnation
                    _configure(replay, self._config)
                    self._tell("the replay server has lost its data; the buffer fills again")
                beats = control.heartbeats()
                before, self._progress = self._progress, _progress(control, stats.size, stats.num_inserted, beats)
                if not alive or time.monotonic() >= next_line:
                    next_line = time.monotonic() + JOURNAL_S
                    events.write("replay", **replay_fields(stats))
                for sentence in (*fleet.look(beats, control.learner_status()), *control.take_news()):
                    self._tell(sentence)
                away_since = None
                if asked is not None and self._progress.is_past(before):
                    asked = time.monotonic()  # it gets on, if slowly: several workers stop at an update of their choice
            except DdilError as error:
                # The server is away. Who depends on it waits with a deadline of its own: the run goes on for a time.
                if away_since is None:
                    away_since = time.monotonic()
                    self._tell(str(error))
                if asked is not None:
                    asked = time.monotonic()  # whether the learner gets on, and hears of it, nobody can know
                if time.monotonic() - away_since > self._config.learner.sample_timeout_s + limits.redis_away_s:
                    raise DdilError(
                        f"the run's Redis has been away for {time.monotonic() - away_since:.0f} s ({error}); start it "
                        "again and launch again to resume"
                    ) from error
                time.sleep(LOOK_S)
            if not alive or self._failure is not None:  # a failed worker's fellows may wait for it
                return
            if self._progress.phase == "starting" and time.monotonic() > next_reminder:
                next_reminder = time.monotonic() + REMINDER_S
                self._remind(time.monotonic() - begun)
            if asked is not None and time.monotonic() - asked > limits.learner_stop_s:
                raise DdilError(
                    f"the learner did not stop within {limits.learner_stop_s:g} s of being asked or of getting on "
                    "(deadlines.learner_stop_s); the run was ended at its last checkpoint"
                )
            learner.join(LOOK_S)

    def _remind(self, waited_s: float) -> None:
        """The learner has not begun yet: say so, and give up where it has had its time."""
        learner = self._config.learner
        waited = (
            f"the learner's {learner.workers} workers have waited {waited_s:.0f} s for their places (each "
            f"{learner.num_cpus:g} CPU, {learner.num_gpus:g} GPU, {learner.resources or 'no custom resources'}, labels "
            f"{learner.label_selector or 'any'}), or cannot reach Redis from there: look at ray status and at Ray's "
            "logs of the workers"
        )
        if waited_s > learner.start_timeout_s:
            raise DdilError(f"{waited}; that is longer than learner.start_timeout_s")
        self._tell(waited)

    def _outcome(self, learner: _LearnerThread, control: RunControl) -> bool:
        """Whether the learner reached its last update; raises DdilError, and tells the monitor, where it failed."""
        try:
            return has_finished(learner.outcome, failure=self._failure, error=learner.error)
        except DdilError as error:
            with suppress(DdilError):
                control.set_failure(str(error))
            raise

    def _beat(self, control: RunControl, status: dict[str, Any]) -> None:
        control.set_supervisor(status, alive_s=self._config.deadlines.silence_s)

    def _say_ended(self, control: RunControl) -> None:
        with suppress(DdilError):
            self._beat(control, {"state": "ended"})

    def _tell(self, sentence: str) -> None:
        self._news.append(sentence)
        del self._news[:-100]  # nobody may be looking
        print(f"ddil_dist: {sentence}", flush=True)


def has_finished(outcome: Outcome | None, *, failure: str | None, error: BaseException | None) -> bool:
    """Whether a learner that has ended reached its last update; raises DdilError where it failed.

    outcome: what its rank 0 returned. failure: what a worker told before. error: what Ray Train raised.
    """
    reason = failure or (outcome.reason if outcome is not None else None)
    if reason is not None or error is not None:
        raise DdilError(f"the learner failed: {reason or error}") from error
    if outcome is None:
        raise DdilError("the learner ended without a word; see the logs of Ray's workers, and launch again to resume")
    return outcome.phase == "finished"


class _LearnerThread(threading.Thread):
    """`TorchTrainer.fit` beside the supervisor's own work."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="learner", daemon=True)
        self._trainer = trainer
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.outcome = self._trainer.fit().return_value
        except BaseException as error:  # handed to the supervisor, which reports it
            self.error = error


def _progress(control: RunControl, size: int, num_inserted: int, beats: dict[str, dict[str, Any]]) -> Progress:
    status = control.learner_status()
    return Progress(
        phase=str(status.get("phase", "starting")),
        update=int(status.get("update", 0)),
        loss=status.get("loss"),
        replay_size=size,
        num_inserted=num_inserted,
        actors=sum("failed" not in beat for beat in beats.values()),
        learner_wait_share=status.get("wait_share"),
        checkpoint_bytes=int(status.get("checkpoint", {}).get("written_bytes", 0)),
    )


def _configure(replay: RedisReplay, config: RunConfig) -> None:
    replay.configure(
        samples_per_insert=config.replay.samples_per_insert,
        min_size=config.replay.min_size,
        error_buffer=config.replay.error_buffer,
        max_staleness=config.replay.max_staleness,
    )


def _settle_fleet(control: RunControl, config: RunConfig) -> None:
    """Ask for the fleet that the configuration wants."""
    bounds = config.rollout.autoscale
    control.set_wanted_actors(config.rollout.actors)
    control.set_autoscale(None if bounds is None else (bounds.min, bounds.max))


@contextmanager
def _replay_server(config: RunConfig) -> Iterator[RedisConfig]:
    """How to reach the run's Redis, password included: the configured server, or one that ends with this block."""
    if config.redis.url is not None:
        connect(config.redis).close()
        yield config.redis
        return
    with EmbeddedServer(config.redis) as server:
        url = server.start(config.run.path / "redis")
        yield config.redis.model_copy(update={"url": url})


def with_credentials(redis: RedisConfig) -> RedisConfig:
    """The servers with the password in their URLs, for processes that see neither our files nor our environment."""
    urls = [full_url(redis.model_copy(update={"url": url})) for url in redis.urls]
    if not urls:
        return redis
    return redis.model_copy(update={"url": urls[0], "more_urls": tuple(urls[1:]), "password_file": None})


@contextmanager
def _started(config: RunConfig, supervisor: Any, tell: Any) -> Iterator[_LearnerThread]:
    """The weight board, the fleet and the learner, running; drained and ended on the way out."""
    drain_s = config.deadlines.fleet_drain_s
    board = start_board(config.run.name, timeout_s=config.deadlines.weights_s)
    fleet = start_fleet(FleetSpec(config=config, board=board))
    if config.learner.min_workers is not None:
        drop_stranded_coordinator(timeout_s=config.deadlines.supervisor_s)
    learner = _LearnerThread(create_ray_trainer(config, board=board, supervisor=supervisor))
    learner.start()
    try:
        yield learner
    finally:
        try:
            drained, error = ray.get(fleet.drain.remote(), timeout=drain_s), ""
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as problem:
            drained, error = False, f": {problem}"
        if not drained:
            tell(f"the rollout fleet did not drain in {drain_s:g} s and was ended{error}")
        for actor in (fleet, board):
            ray.kill(actor)


def start_supervisor(config: RunConfig, identity: RunIdentity) -> Any:
    """Start the run's supervisor on this node where possible: the run's directory and an embedded Redis are here."""
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=8)(RunSupervisor)
    return remote.options(
        name=actor_name(config.run.name),
        namespace=NAMESPACE,
        lifetime="detached",
        scheduling_strategy=on_this_node(),
        runtime_env={"env_vars": ENVIRONMENT},
    ).remote(config, identity)
