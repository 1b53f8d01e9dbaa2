"""The Ray Train shell of the learner: what every worker of the TorchTrainer runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from accelerate import Accelerator
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

from ddil_dist.config import RunConfig
from ddil_dist.control import HEARTBEAT_S, RunControl, reason_of
from ddil_dist.errors import DdilError, EnvironmentFailure
from ddil_dist.problem import ImitationProblem, default_device
from ddil_dist.replay.redis_replay import RedisReplay
from ddil_dist.replay.server import connect
from ddil_dist.weights.ray_store import RayWeightStore
from learner.assemble import checkpoints_of, create_accelerator, create_trainer
from learner.growth import await_checkpoint, wanted_checkpoint
from learner.update_record import UpdateRecord

logger = logging.getLogger(__name__)

STATUS_S = 0.5
FEW_DEATHS = 3
"""In a row: after so many the pauses before the next try are still short, and a lost node explains them."""
LOST_NODE_S = 60.0
"""Ray takes no longer to say that a node is lost."""


@dataclass(frozen=True)
class Outcome:
    """How the learner ended: what rank 0's `train_worker` returns.

    phase     "finished", "stopped" or "failed".
    reason    why it failed; None where it did not.
    """

    phase: str
    reason: str | None = None


class CheckpointBeforeGrowth(ControllerCallback):  # type: ignore[misc]  # Ray's own has no types
    """Of the RunConfig's callbacks: Ray takes internal ones there, for want of a public one that hears of resizing."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """The group's controller enters a state. A group that shrinks has lost a worker, and can write nothing."""
        if isinstance(current_state, ResizingState):
            try:
                with closing(RunControl(connect(self._config.redis), self._config.run.name)) as control:
                    if current_state.scaling_decision.num_workers > control.learner_status().get("workers", 0):
                        await_checkpoint(control, timeout_s=self._config.deadlines.learner_stop_s)
            except DdilError as error:  # the workers go on from their last one
                print(f"ddil_dist: no checkpoint before the learner grows: {error}", flush=True)


def create_ray_trainer(config: RunConfig, *, board: Any, supervisor: Any) -> TorchTrainer:
    """The run's TorchTrainer; `fit` trains to the end or until the run is asked to stop, and returns an `Outcome`.

    supervisor: the actor whose `learner_failed` hears why the learner cannot go on. By Ray, as what it cannot reach
    may be Redis.
    """
    learner = config.learner
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "board": board, "supervisor": supervisor},
        scaling_config=ray.train.ScalingConfig(
            num_workers=learner.workers if learner.min_workers is None else (learner.min_workers, learner.workers),
            elastic_resize_monitor_interval_s=config.deadlines.resize_s,
            use_gpu=learner.num_gpus > 0,
            resources_per_worker={"CPU": learner.num_cpus, **learner.resources}
            | ({"GPU": learner.num_gpus} if learner.num_gpus else {}),
            label_selector=learner.label_selector or None,
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(config.run.path.resolve()),
            # Workers count their own restarts (`_check_starts`): lost nodes must not end a run that gets on.
            failure_config=ray.train.FailureConfig(max_failures=-1),
            callbacks=[] if learner.min_workers is None else [CheckpointBeforeGrowth(config)],
        ),
    )


def train_worker(settings: dict[str, Any]) -> Outcome:
    """Train as one of the workers. An error of ours ends the run at once; any other is Ray Train's to retry."""
    try:
        return _work(settings)
    except DdilError as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        logger.error("the learner fails: %s", reason)
        # The supervisor ends the run, and with it workers that wait for this one.
        config: RunConfig = settings["config"]
        _asked(settings["supervisor"].learner_failed, reason, timeout_s=config.deadlines.supervisor_s)
        return Outcome("failed", reason)


def _work(settings: dict[str, Any]) -> Outcome:
    config: RunConfig = settings["config"]
    torch.set_num_threads(config.learner.threads)
    device = default_device()
    accelerator = create_accelerator(config, cpu=device.type == "cpu")
    control = RunControl(_await_redis(config), config.run.name)
    report = StatusReport(control, config, accelerator)
    with ExitStack() as stack:
        stack.callback(control.close)
        if accelerator.is_main_process:
            stack.enter_context(log_to_launcher(control))
            with suppress(EnvironmentFailure):
                control.set_learner_place(ray.util.get_current_placement_group().id.hex())
        try:
            phase = _train(config, settings, accelerator, control, report, stack)
            report.phase(phase)
            return Outcome(phase)
        except DdilError:
            raise
        except Exception as error:
            with suppress(EnvironmentFailure):
                control.note_death(f"{type(error).__name__}: {reason_of(error)}")
            raise


def _train(
    config: RunConfig,
    settings: dict[str, Any],
    accelerator: Accelerator,
    control: RunControl,
    report: StatusReport,
    stack: ExitStack,
) -> str:
    """Train to the end or until asked to stop; the phase that the learner is in then."""
    if accelerator.is_main_process:
        _check_starts(config, control)
    report.phase("loading")
    problem = ImitationProblem.create(config, accelerator.device)
    seed = config.run.seed * 1009 + accelerator.process_index
    replay = RedisReplay(config.replay, config.redis, run=config.run.name, seed=seed)
    stack.callback(replay.close)
    weights = RayWeightStore(
        settings["board"], timeout_s=config.deadlines.weights_s, room_s=config.deadlines.weights_room_s
    )

    def has_readers() -> bool:
        wanted = control.wanted_actors()
        return config.rollout.actors > 0 if wanted is None else wanted > 0

    asked = accelerator.is_main_process and config.learner.min_workers is not None
    trainer = create_trainer(
        config,
        problem,
        accelerator=accelerator,
        replay=replay,
        weights=weights,
        on_publish=replay.note_weights,
        has_readers=has_readers,
        on_update=lambda record: report.update(record, data=problem.data_status()),
        on_wait=lambda: report.phase("waiting for states"),
        on_checkpoint=report.saving,
        is_checkpoint_wanted=wanted_checkpoint(control, checkpoints_of(config)) if asked else lambda update: False,
        is_excused=lambda: _is_fleet_away(control),
    )
    report.phase("waiting for the first states")
    supervisor, main = settings["supervisor"], accelerator.is_main_process
    answer_s = config.deadlines.supervisor_s
    trained = trainer.run(should_stop=lambda: main and _is_asked_to_stop(control, supervisor, timeout_s=answer_s))
    return "finished" if trained else "stopped"


def _await_redis(config: RunConfig) -> Any:
    """A client of the run's server, which may be just restarting. Raises EnvironmentFailure."""
    deadline = time.monotonic() + config.deadlines.redis_start_s
    while True:
        try:
            return connect(config.redis)
        except EnvironmentFailure:
            if time.monotonic() > deadline:
                raise
            time.sleep(STATUS_S)


def _is_asked_to_stop(control: RunControl, supervisor: Any, *, timeout_s: float) -> bool:
    """Whether the run is to stop. While Redis is away the learner goes on, unless the supervisor itself says so."""
    try:
        return control.stop_requested()
    except EnvironmentFailure:
        return bool(_asked(supervisor.is_asked_to_stop, timeout_s=timeout_s))


def _asked(method: Any, *arguments: Any, timeout_s: float) -> Any:
    """What the supervisor answers; None where it does not."""
    try:
        return ray.get(method.remote(*arguments), timeout=timeout_s)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        return None


def _is_fleet_away(control: RunControl) -> bool:
    """Whether there is a reason that no states come, which will not last.

    The fleet is paused, has no place to run at, is loading, was just lost with its node, or is about to be tried again
    after that; not where its actors die again and again, or say nothing for long.
    """
    try:
        fleet, beats = control.fleet(), control.heartbeats().values()
    except EnvironmentFailure:
        return False
    begun = any("pid" in beat or "failed" in beat for beat in beats)
    silent_s = time.time() - max((beat["time"] for beat in beats), default=0.0)
    deaths = [int(beat["deaths"]) for beat in beats if "deaths" in beat]
    return (
        fleet.get("wanted") == 0
        or fleet.get("waiting_for_a_place", 0) > 0
        or not begun
        or 2 * HEARTBEAT_S < silent_s < LOST_NODE_S
        or (fleet.get("running") == 0 and fleet.get("backing_off", 0) > 0 and min(deaths, default=0) <= FEW_DEATHS)
    )


def _check_starts(config: RunConfig, control: RunControl) -> None:
    """Raises DdilError where the workers die again and again before they reach another checkpoint."""
    store = checkpoints_of(config)
    update = store.newest_update() or 0
    starts = control.count_start(update)
    if starts > config.learner.max_failures + 1:
        last = control.last_death() or "see the logs of Ray's workers"
        raise DdilError(
            f"the workers have died {starts - 1} times in a row without a checkpoint after update {update} "
            f"(learner.max_failures={config.learner.max_failures}); the last time: {last}"
        )


@contextmanager
def log_to_launcher(control: RunControl) -> Iterator[None]:
    """Within the block what is logged reaches whoever watches the run: nobody reads the logs of Ray's workers."""

    class Telling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(EnvironmentFailure):
                control.tell(record.getMessage())

    handler, loggers = Telling(logging.INFO), [logging.getLogger(name) for name in ("ddil_dist", "learner")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class StatusReport:
    """Tells the run's control keys how the learner is doing, at most every STATUS_S."""

    def __init__(self, control: RunControl, config: RunConfig, accelerator: Accelerator) -> None:
        self._control = control
        self._prior = config.prior
        self._enabled = accelerator.is_main_process
        self._status: dict[str, Any] = {"workers": accelerator.num_processes}
        self._last = 0.0
        self._begun: float | None = None
        self._first_update = 0
        self._wait_s = self._label_s = self._total_s = 0.0

    def phase(self, name: str) -> None:
        """The learner enters a phase."""
        self._tell({"phase": name})

    def saving(self, update: int, written_bytes: int, total_bytes: int) -> None:
        """A checkpoint is waited for; it has about total_bytes in all."""
        self._tell({"checkpoint": {"update": update, "written_bytes": written_bytes, "total_bytes": total_bytes}})

    def _tell(self, news: Mapping[str, Any], *, now: bool = True) -> None:
        self._status |= news
        if self._enabled and now:
            with suppress(EnvironmentFailure):  # while Redis is away nobody reads it, and batches wait with a deadline
                self._control.set_learner_status(self._status)

    def update(self, record: UpdateRecord, *, data: Mapping[str, int] | None) -> None:
        """The learner made an update; data: what this worker knows of it (`ImitationProblem.data_status`)."""
        now = time.monotonic()
        if self._begun is None:
            self._begun, self._first_update = now - record.update_s, record.update - 1
        self._wait_s += record.wait_s
        self._label_s += record.label_s
        self._total_s += record.update_s
        part = self._prior.at(record.update / record.total_updates)
        elapsed, made = now - self._begun, record.update - self._first_update
        news = {
            "elapsed_s": elapsed,
            "left_s": (record.total_updates - record.update) * elapsed / max(1, made),
            "update": record.update,
            "total_updates": record.total_updates,
            "loss": record.loss,
            "loss_by_source": {name.lower(): loss for name, loss in record.loss_by_source.items()},
            "updates_per_s": made / max(1e-9, elapsed),
            "staleness_mean": record.staleness_mean,
            "wait_share": self._wait_s / max(1e-9, self._total_s),
            "label_share": self._label_s / max(1e-9, self._total_s),
            "prior": {"forward": part.forward, "student": part.student, "teacher": part.teacher},
            "data": data,
        }
        due = now - self._last >= STATUS_S or record.update == record.total_updates
        if due:
            self._last = now
        self._tell(news | {"phase": "training"}, now=due)
