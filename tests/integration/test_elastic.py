"""A learner of two workers on two nodes: stopped while it waits for states, resumed, and one of its nodes lost."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ddil_dist.control import RunControl
from ddil_dist.journal import read_journal
from ddil_dist.on_ray import drop_stranded_coordinator
from ddil_dist.replay import EmbeddedServer
from tests.integration.support import environment, override, wait_for

pytestmark = pytest.mark.integration

PATIENCE_S = 200.0
EVERY = 200


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # nobody but this test knows the ports
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield started
    started.shutdown()


def test_a_coordinator_whose_node_is_lost_gives_way_to_another(cluster: Any) -> None:
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    lost = cluster.add_node(num_cpus=0, resources={"learner": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        assert not drop_stranded_coordinator(timeout_s=60), "there is none"

        @ray.remote(num_cpus=0, resources={"learner": 1})
        def begin() -> None:
            ray.get(get_or_create_autoscaling_coordinator().__ray_ready__.remote(), timeout=60)

        ray.get(begin.remote(), timeout=60)
        assert not drop_stranded_coordinator(timeout_s=60), "it is well"
        cluster.remove_node(lost, allow_graceful=False)
        wait_for(lambda: drop_stranded_coordinator(timeout_s=5), timeout_s=90, what="it is found stranded")

        def is_back() -> bool:
            try:
                ray.get(get_or_create_autoscaling_coordinator().__ray_ready__.remote(), timeout=10)
            except ray.exceptions.RayError:  # the name of the one before is being given up
                return False
            return True

        wait_for(is_back, timeout_s=60, what="another is made here")
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_stop_together_and_a_lost_node_costs_the_updates_since_the_last_checkpoint(
    cluster: Any, tiny_overrides: list[str], tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=0, resources={"learner": 1}) for _ in range(2)]
    with EmbeddedServer() as server:
        url = server.start(tmp_path / "redis")
        overrides = [
            *(item for item in tiny_overrides if not item.startswith("run.execution")),
            f"redis.url={url}",
            "learner.workers=2",
            "learner.min_workers=1",
            "learner.num_cpus=0",
            "learner.resources.learner=1",
            "learner.updates=1000000",
            f"learner.checkpoint_every={EVERY}",
        ]
        log = tmp_path / "log"
        run = Path(override(overrides, "run.directory")) / "tiny"

        def launch() -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                return subprocess.Popen(
                    [sys.executable, "-m", "ddil_dist.launch", *overrides],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(RAY_ADDRESS=cluster.address, RAY_AUTH_MODE="disabled"),
                )

        control = RunControl.from_url(url, "tiny")

        def reached(update: int, *, workers: int, phase: str = "training") -> bool:
            assert launcher.poll() is None, log.read_text()
            status = control.learner_status()
            there = (status.get("workers"), status.get("phase"))
            return there == (workers, phase) and status.get("update", 0) > update

        launcher = launch()
        try:
            wait_for(lambda: reached(25, workers=2), timeout_s=PATIENCE_S, what="two workers train")
            control.set_wanted_actors(0)
            wait_for(
                lambda: reached(25, workers=2, phase="waiting for states"), timeout_s=PATIENCE_S, what="they starve"
            )
            starved = int(control.learner_status()["update"])
            control.request_stop()
            assert launcher.wait(120) == 130, log.read_text()
            assert (run / "checkpoints" / f"update_{starved:08d}").is_dir(), "both stopped where they waited"

            launcher = launch()
            wait_for(lambda: reached(starved + 25, workers=2), timeout_s=PATIENCE_S, what="they go on")
            before = int(control.learner_status()["update"])
            cluster.remove_node(nodes[1], allow_graceful=False)
            wait_for(lambda: reached(0, workers=1), timeout_s=PATIENCE_S, what="one worker trains")
            resumed = int(control.learner_status()["update"])
            assert resumed >= before - before % EVERY
            wait_for(lambda: reached(resumed + 20, workers=1), timeout_s=PATIENCE_S, what="it goes on")
            alone = int(control.learner_status()["update"])
            cluster.add_node(num_cpus=0, resources={"learner": 1})
            wait_for(lambda: reached(alone, workers=2), timeout_s=PATIENCE_S, what="two workers train again")
            control.request_stop()
            assert launcher.wait(120) == 130, log.read_text()
        finally:
            launcher.kill()
        updates = [line["update"] for line in read_journal(run / "metrics.jsonl") if line["kind"] == "update"]
        last = max(place for place, (one, next_one) in enumerate(itertools.pairwise(updates)) if next_one <= one)
        assert updates[last + 1] > alone, "growing costs no more than what was done while the checkpoint was written"
        assert any(path.name.startswith("update_") for path in (run / "checkpoints").iterdir())
