"""A run on a cluster of two nodes, scaled, starved and shot at: real Ray, real Redis, real kills, real exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ddil_dist.control import RunControl
from ddil_dist.replay import EmbeddedServer
from tests.integration.support import command, environment, wait_for

pytestmark = pytest.mark.integration

REPLACED_S = 200.0
"""Far above what a quiet machine needs: two cores may share all of it with others."""


SAMPLE_TIMEOUT_S = 8.0
"""Shorter than any outage of the fleet here, which the learner must sit out."""


@dataclass
class Living:
    """A cluster with a head, which has the learner's place, and a node with two rollout places; and its Redis."""

    cluster: Any
    node: Any
    url: str
    env: dict[str, str]
    overrides: list[str]

    def launch(self, run: str, log: Path, *more: str) -> subprocess.Popen[bytes]:
        """Start the launcher of a run of this name."""
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "ddil_dist.launch", *self.overrides, f"run.name={run}", *more],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env,
            )

    def add_node(self) -> None:
        self.node = self.cluster.add_node(num_cpus=0, resources={"rollout": 2}, labels={"pool": "rollouts"})

    def run(self, module: str, run: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return command(module, "--run", run, "--url", self.url, *arguments, env=self.env)

    def actors(self, run: str) -> list[str]:
        """Names of the run's actors that are alive on the cluster."""
        script = (
            "import logging, ray;"
            "ray.init(address='auto', log_to_driver=False, logging_level=logging.ERROR);"
            "print(*[a['name'] for a in ray.util.list_named_actors(all_namespaces=True)])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=self.env, timeout=60, check=True
        )
        return [name for name in done.stdout.split() if name.startswith(f"ddil/{run}/")]


@pytest.fixture(scope="module")
def living(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    from ray.cluster_utils import Cluster

    directory = tmp_path_factory.mktemp("cluster")
    before = {key: os.environ.get(key) for key in ("RAY_AUTH_MODE", "PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ["RAY_AUTH_MODE"] = "disabled"  # nobody but this test knows the ports
    os.environ["OMP_NUM_THREADS"] = "1"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    overrides = [
        f"run.directory={directory / 'runs'}",
        f"teacher.pipeline={tiny_directory / 'pipeline'}",
        f"data.path={tiny_directory / 'data.parquet'}",
        "teacher.steps=8",
        "student.steps=4",
        "rollout.batch_size=8",
        "rollout.insert_batch=8",
        "rollout.num_cpus=0",
        "rollout.resources.rollout=1",
        "rollout.label_selector.pool=rollouts",
        "learner.updates=1000000",
        "learner.batch_size=8",
        "learner.publish_every=2",
        f"learner.sample_timeout_s={SAMPLE_TIMEOUT_S}",
        "learner.checkpoint_every=50",
        "replay.min_size=16",
        "replay.error_buffer=64",
        "evaluation.num_images=0",
    ]
    with EmbeddedServer() as server:
        url = server.start(directory / "redis")
        env = environment(RAY_ADDRESS=cluster.address, RAY_AUTH_MODE="disabled")
        found = Living(cluster, None, url, env, [*overrides, f"redis.url={url}"])
        found.add_node()
        yield found
        cluster.shutdown()
    for key, value in before.items():
        os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def update_of(control: RunControl) -> int:
    return int(control.learner_status().get("update", 0))


def learns(control: RunControl) -> None:
    """The learner makes updates now."""
    now = update_of(control)
    wait_for(lambda: update_of(control) > now + 5, timeout_s=REPLACED_S, what="the learner goes on")


def writers(control: RunControl) -> set[str]:
    """Actors that roll out."""
    return {str(beat["writer"]) for beat in control.heartbeats().values() if "pid" in beat}


@pytest.mark.timeout(1200)
def test_a_run_survives_the_death_of_everything_and_ends_when_told(living: Living, tmp_path: Path) -> None:
    launcher = living.launch("first", tmp_path / "first.log")
    control = RunControl.from_url(living.url, "first")

    def has_begun() -> bool:
        assert launcher.poll() is None, (tmp_path / "first.log").read_text()
        return update_of(control) > 0 and bool(writers(control))

    wait_for(has_begun, timeout_s=2 * REPLACED_S, what="the first update")

    # Scaled from another shell, while it runs.
    scaled = living.run("ddil_dist.scale", "first", "--rollouts", "2")
    assert scaled.returncode == 0, scaled.stdout + scaled.stderr
    assert scaled.stdout.splitlines()[0] == "first: 2 rollout actors wanted, 1 before"
    assert scaled.stdout.splitlines()[-1] == "first: 2 of 2 rollout actors run"
    wait_for(lambda: writers(control) == {"actor-0.1", "actor-1.1"}, timeout_s=REPLACED_S, what="two actors roll out")

    # More than the cluster has room for: said so, and the two that run go on.
    crowded = living.run("ddil_dist.scale", "first", "--rollouts", "3", "--wait", "4")
    assert crowded.returncode == 1
    assert "first: 2 of 3 rollout actors run, 1 wait for a place" in crowded.stdout
    assert "no node has the resources and labels" in crowded.stderr
    assert living.run("ddil_dist.scale", "first", "--rollouts", "2").returncode == 0
    learns(control)

    # Paused for longer than the learner would wait for states otherwise, and taken up again.
    assert living.run("ddil_dist.scale", "first", "--rollouts", "0").returncode == 0
    wait_for(
        lambda: control.learner_status()["phase"] == "waiting for states",
        timeout_s=REPLACED_S,
        what="it is out of states",
    )
    time.sleep(1.3 * SAMPLE_TIMEOUT_S)
    assert control.is_alive()
    assert living.run("ddil_dist.scale", "first", "--rollouts", "2").returncode == 0
    learns(control)

    # The launcher dies: the run goes on, and an actor that dies afterwards is still replaced.
    launcher.send_signal(signal.SIGKILL)
    launcher.wait(10)
    learns(control)
    os.kill(control.heartbeats()["actor-0"]["pid"], signal.SIGKILL)
    wait_for(lambda: "actor-0.3" in writers(control), timeout_s=REPLACED_S, what="the killed actor is replaced")

    # So is the manager, with the same wanted number.
    os.kill(control.fleet()["pid"], signal.SIGKILL)
    wait_for(
        lambda: writers(control) >= {"actor-0.4", "actor-1.3"}, timeout_s=REPLACED_S, what="the fleet is back at two"
    )
    learns(control)

    # The node of the actors stops, and another comes.
    living.cluster.remove_node(living.node, allow_graceful=False)
    wait_for(lambda: control.fleet()["running"] == 0, timeout_s=REPLACED_S, what="the node's actors are gone")
    living.add_node()
    wait_for(lambda: control.fleet()["running"] == 2, timeout_s=REPLACED_S, what="the fleet is on the new node")
    learns(control)

    # Another run comes to live beside it, on the same cluster and the same Redis.
    second = living.launch("second", tmp_path / "second.log", "rollout.actors=0", "learner.updates=100000")
    other = RunControl.from_url(living.url, "second")

    # Even the root of the run: Ray starts it again, it resumes from a checkpoint, and still wants two actors.
    wait_for(lambda: update_of(control) > 60, timeout_s=REPLACED_S, what="there is a checkpoint")
    pid = control.supervisor()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: control.supervisor().get("pid") not in (None, pid), timeout_s=REPLACED_S, what="it is back")
    wait_for(lambda: control.learner_status()["phase"] == "training", timeout_s=REPLACED_S, what="it trains again")
    assert update_of(control) > 50
    wait_for(lambda: control.fleet()["running"] == 2, timeout_s=REPLACED_S, what="the fleet is complete again")

    wait_for(other.is_alive, timeout_s=REPLACED_S, what="the second run has begun")

    # Launched again, it is watched again; with another configuration it is left alone.
    changed = command(
        "ddil_dist.launch", *living.overrides, "run.name=first", "learner.publish_every=4", env=living.env
    )
    assert changed.returncode == 2
    assert "'first' is going on with another configuration (publish_every: 4)" in changed.stderr
    launcher = living.launch("first", tmp_path / "again.log")
    wait_for(lambda: "is going on" in (tmp_path / "again.log").read_text(), timeout_s=60, what="it is watched again")

    # Stopped from another shell: a checkpoint, and nothing of it is left, but the other run is.
    stopped = living.run("ddil_dist.stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert launcher.wait(60) == 130, (tmp_path / "again.log").read_text()
    assert "first: ended after update" in stopped.stdout
    checkpoints = sorted((Path(living.overrides[0].split("=")[1]) / "first" / "checkpoints").iterdir())
    assert int(checkpoints[-1].name.removeprefix("update_")) >= int(stopped.stdout.split("update ")[1].split(";")[0])
    wait_for(lambda: not living.actors("first"), timeout_s=30, what="its actors are gone")
    assert {"ddil/second/supervisor", "ddil/second/fleet", "ddil/second/weights"} <= set(living.actors("second"))
    assert other.is_alive()

    # A run that is not going on is neither scaled nor stopped.
    for module, arguments in (("ddil_dist.scale", ("--rollouts", "1")), ("ddil_dist.stop", ())):
        refused = living.run(module, "first", *arguments)
        assert refused.returncode == 2
        assert "no run 'first' is going on at this server: it has ended" in refused.stderr

    # One that does not listen is killed, with all that it started.
    killed = living.run("ddil_dist.stop", "second", "--kill")
    assert killed.returncode == 0, killed.stderr
    assert second.wait(60) == 1
    assert "ended from elsewhere" in (tmp_path / "second.log").read_text()
    wait_for(lambda: not living.actors("second"), timeout_s=30, what="its actors are gone")
