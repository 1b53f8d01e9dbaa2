"""`execution: ray`: a local or given Ray, and on it the run's supervisor, started or found, and watched."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from ddil_dist.config import Deadlines, RunConfig
from ddil_dist.errors import ConfigError, DdilError, EnvironmentFailure
from ddil_dist.launch.identity import RunIdentity
from ddil_dist.launch.ours import changed, claim
from ddil_dist.launch.plan import required_resources
from ddil_dist.launch.progress import Progress, ProgressView
from ddil_dist.on_ray import NAMESPACE, actor_name
from ddil_dist.replay.server import connect, is_loopback
from ddil_dist.signals import stop_on_signals
from ddil_dist.status import is_asked_to_stop

LOOK_S = 0.5
SOCKET_PATH = 107
"""Bytes of a Unix socket's name, at most."""
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""A local Ray's longest, below its temporary directory."""


def run_cluster(config: RunConfig) -> bool:
    """Train the run to its end; False if it was stopped before. Leaves nothing running that it started."""
    if names := changed():
        raise ConfigError(
            f"run.execution: {', '.join(names[:3])}: changed in this process alone; 'ray' starts others that would "
            "go on without; set run.execution=inline, or make the change where the package is installed"
        )
    if config.redis.url is not None:
        connect(config.redis).close()
    with stop_on_signals() as stop, _ray_session(config) as ray:
        supervisor = _find(config, ray) or _start(config, ray)
        try:
            finished = _watch(config, supervisor, stop, ray)
        except (_RunOverError, KeyboardInterrupt):
            _end(supervisor, ray)
            raise
        _end(supervisor, ray)
        return finished


class _RunOverError(DdilError):
    """The run has ended, or must: other errors of watching it leave it alone."""


def _end(supervisor: Any, ray: Any) -> None:
    with suppress(ray.exceptions.RayError):
        ray.kill(supervisor)


@contextmanager
def _ray_session(config: RunConfig) -> Iterator[Any]:
    """Ray, local or at RAY_ADDRESS. Raises EnvironmentFailure where it cannot be had."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_listens(address, config.deadlines.cluster_connect_s)
    else:
        _check_own_gpus(config)
        _check_socket_paths()
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if claim():  # every process of the run must find ours, too
        quiet["runtime_env"] = {"worker_process_setup_hook": "ddil_dist.launch.ours.claim_in_worker"}
    try:
        if address:
            ray.init(**quiet)
        else:
            cpus = max(os.cpu_count() or 1, round(required_resources(config).get("CPU", 0) + 0.5))
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        raise EnvironmentFailure(f"cannot start or reach {where}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_listens(address: str, timeout_s: float) -> None:
    """Raises EnvironmentFailure at once where nobody listens; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # "auto", "local", or a name that Ray resolves
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError as error:
        raise EnvironmentFailure(
            f"RAY_ADDRESS: nobody listens at {address} ({error}); start the cluster, correct the address, or unset it "
            "for a Ray of this machine"
        ) from error


def _check_socket_paths() -> None:
    """Raises EnvironmentFailure where the sockets of a local Ray would have names too long for the system."""
    for name in ("RAY_TMPDIR", "TMPDIR"):  # the first that is set is used
        directory = os.environ.get(name)
        if directory is not None:
            break
    else:
        return
    longest = SOCKET_PATH - len(SOCKET)
    if len(os.fsencode(directory)) > longest:
        raise EnvironmentFailure(
            f"{name}: {directory!r} is too long for Ray's sockets, which go below it: at most {longest} bytes; set "
            "RAY_TMPDIR=/tmp, or another short directory of this machine"
        )


def _check_own_gpus(config: RunConfig) -> None:
    """Raises EnvironmentFailure where the run asks for more GPUs than this machine has."""
    asked = {
        "learner.num_gpus": config.learner.num_gpus * config.learner.workers,
        "rollout.num_gpus": config.rollout.num_gpus * config.rollout.actors,
    }
    if not any(asked.values()):
        return
    import torch

    there = torch.cuda.device_count()
    if sum(asked.values()) > there:
        keys = " and ".join(f"{key} ({num:g} in all)" for key, num in asked.items() if num)
        raise EnvironmentFailure(
            f"{keys} ask for {sum(asked.values()):g} GPUs, and this machine has {there}; lower them (0.5 each shares "
            "one, 0 computes on the CPU), or join a cluster by RAY_ADDRESS"
        )


def _find(config: RunConfig, ray: Any) -> Any:
    """The supervisor of the run if it is alive on this cluster: its launcher has died. None where there is none."""
    answer_s = config.deadlines.supervisor_s
    try:
        supervisor = ray.get_actor(actor_name(config.run.name), namespace=NAMESPACE)
    except ValueError:
        return None
    try:
        living = ray.get(supervisor.identity.options(max_task_retries=-1).remote(), timeout=answer_s)
        if ray.get(supervisor.look.remote(), timeout=answer_s).ended:  # nobody was there to hear of it
            ray.kill(supervisor)
            return None
    except ray.exceptions.ActorDiedError:  # it has just ended
        return None
    except ray.exceptions.GetTimeoutError:
        raise EnvironmentFailure(
            f"the supervisor of run {config.run.name!r} is alive but did not answer in {answer_s:g} s; end it with "
            f"python -m ddil_dist.stop --run {config.run.name} --kill"
        ) from None
    RunIdentity.of(config).check_same(living, config.run.name)
    print(f"ddil_dist: run {config.run.name!r} is going on; watching it")
    return supervisor


def _start(config: RunConfig, ray: Any) -> Any:
    from ddil_dist.launch.supervisor import start_supervisor, with_credentials

    _check_nodes(config, ray)
    _check_labels(config, ray)
    _check_resources(required_resources(config), config.deadlines, ray)
    secret = config.model_copy(update={"redis": with_credentials(config.redis)})
    return start_supervisor(secret, RunIdentity.of(config))


def _watch(config: RunConfig, supervisor: Any, stop: threading.Event, ray: Any) -> bool:
    """Show the run until it has ended; True if it was trained to its end. Passes a request to stop on."""
    console = Console()
    asked: float | None = None
    heard = time.monotonic()
    answer_s = config.deadlines.supervisor_s
    stop_s = config.deadlines.learner_stop_s + config.deadlines.fleet_drain_s + config.deadlines.ending_s
    seen, before = None, Progress(phase="starting")
    with ProgressView(config, console) as view:
        while True:
            try:
                if stop.is_set() or is_asked_to_stop(
                    config.run.path
                ):  # said again and again: one that was just restarted has forgotten
                    asked = asked or time.monotonic()
                    ray.get(supervisor.stop.remote("its launcher was interrupted"), timeout=answer_s)
                seen = ray.get(supervisor.look.remote(), timeout=answer_s)
                heard = time.monotonic()
            except ray.exceptions.ActorDiedError as error:
                if seen is None:
                    raise EnvironmentFailure(f"the run's supervisor could not start: {error}") from error
                raise DdilError(
                    "the run was ended from elsewhere, at its last checkpoint; launch again to resume"
                ) from None
            except ray.exceptions.ActorUnavailableError as error:  # it died: Ray starts it again
                if time.monotonic() - heard > answer_s:
                    raise DdilError(
                        f"the run's supervisor has been away for {answer_s:g} s ({error}); launch again to resume"
                    ) from error
                time.sleep(LOOK_S)
                continue
            except ray.exceptions.GetTimeoutError:
                raise DdilError(
                    f"the run's supervisor did not answer in {answer_s:g} s; is its node alive (ray status)? Launch "
                    "again to watch or resume"
                ) from None
            if asked is not None and seen.progress.is_past(before):
                asked = time.monotonic()  # it gets on, if slowly
            before = seen.progress
            view.show(seen.progress)
            for sentence in seen.news:
                console.print(f"ddil_dist: {sentence}", highlight=False, markup=False)
            if seen.ended:
                if seen.error is not None:
                    raise _RunOverError(seen.error)
                return bool(seen.finished)
            if asked is not None and time.monotonic() - asked > stop_s:
                raise _RunOverError(f"the run did not end within {stop_s:g} s of being asked, and was ended at once")
            time.sleep(LOOK_S)


def _check_nodes(config: RunConfig, ray: Any) -> None:
    """Refuse a Redis that only this machine can reach where there are others."""
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1 and (config.redis.url is None or any(is_loopback(url) for url in config.redis.urls)):
        given = "not set" if config.redis.url is None else "on this machine's loopback"
        raise ConfigError(
            f"redis.url: {given}, but the cluster has {len(machines)} machines, which cannot reach it there; start a "
            "Redis with a password and give a URL that all of them reach"
        )


def _check_labels(config: RunConfig, ray: Any) -> None:
    """Refuse plain label selectors that no node matches; Ray's operators (!, in) are Ray's to judge."""
    labels = [node.get("Labels", {}) for node in ray.nodes() if node["Alive"]]
    for key, section in (("rollout", config.rollout), ("learner", config.learner)):
        plain = {label: value for label, value in section.label_selector.items() if value.isidentifier()}
        if plain and not any(plain.items() <= node.items() for node in labels):
            there = sorted({f"{label}={value}" for node in labels for label, value in node.items()})
            raise EnvironmentFailure(
                f"{key}.label_selector: no node has {plain}; the cluster's labels are {', '.join(there) or 'none'}; "
                "start a node with ray start --labels"
            )


def _check_resources(needed: Mapping[str, float], deadlines: Deadlines, ray: Any) -> None:
    begun = time.monotonic()
    while True:
        free = ray.available_resources()
        short = {name: amount for name, amount in needed.items() if free.get(name, 0) < amount}
        if not short:
            return
        total = ray.cluster_resources()
        busy = all(total.get(name, 0) >= amount for name, amount in short.items())
        if time.monotonic() - begun > (deadlines.busy_resources_s if busy else deadlines.resources_s):
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
