"""A run in one process ends bit for bit where it would have ended, wherever it was stopped and whenever killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ddil_dist.config import RunConfig, load_config
from ddil_dist.launch import inline
from ddil_dist.launch.inline import run_inline
from learner.state_file import load_state

UPDATES = 9
EXACT = ("student.safetensors", "average.safetensors", "trainer.safetensors", "worker_0.safetensors")


def config_of(overrides: list[str], name: str, *more: str) -> RunConfig:
    return load_config(
        None,
        [*overrides, f"run.name={name}", f"learner.updates={UPDATES}", "learner.publish_every=4", *more],
    )


class Stop:
    """Answers yes when it was asked `num` times."""

    def __init__(self, num: int) -> None:
        self._left = num

    def is_set(self) -> bool:
        self._left -= 1
        return self._left == 0


def run(config: RunConfig, monkeypatch: pytest.MonkeyPatch, *, stop_after: int = 0) -> bool:
    @contextmanager
    def stop() -> Iterator[Stop]:
        yield Stop(stop_after)

    monkeypatch.setattr(inline, "stop_on_signals", stop)
    return run_inline(config)


def digests(config: RunConfig) -> dict[str, str]:
    """Of the last checkpoint's files that hold no times."""
    path = config.run.path / "checkpoints" / f"update_{UPDATES:08d}" / "manifest.json"
    files = json.loads(path.read_text())["files"]
    return {name: files[name]["digest"] for name in EXACT}


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, dict[str, str]]:
    return {}


@pytest.mark.parametrize("labels", ["actors", "learner"])
@pytest.mark.parametrize("stops", [[1], [3], [4], [6], [8], [2, 1, 1, 3]])
def test_a_stopped_run_ends_where_it_would_have_ended(
    tiny_overrides: list[str],
    stops: list[int],
    labels: str,
    whole_runs: dict[str, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = (f"rollout.labels={labels}", "rollout.insert_batch=5")
    if labels not in whole_runs:
        whole = config_of(tiny_overrides, "whole", *more)
        assert run(whole, monkeypatch)
        whole_runs[labels] = digests(whole)
    cut = config_of(tiny_overrides, "cut", *more)
    for stop_after in stops:
        torch.manual_seed(stop_after)  # what the process drew before must not matter
        assert not run(cut, monkeypatch, stop_after=stop_after)
    assert run(cut, monkeypatch)
    assert digests(cut) == whole_runs[labels]


def test_replay_and_rollouts_go_on_as_they_were(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (config_of(tiny_overrides, name) for name in ("whole", "cut"))
    run(whole, monkeypatch)
    run(cut, monkeypatch, stop_after=5)
    run(cut, monkeypatch)
    states = [
        load_state(config.run.path / "checkpoints" / f"update_{UPDATES:08d}" / "with_surroundings.safetensors")
        for config in (whole, cut)
    ]
    for state in states:
        assert state["rollout"]["engine"]["counters"].pop("network_s") > 0
        assert state["rollout"]["engine"]["counters"].pop("tick_s") > 0
        state["replay"]["counters"].pop("waits_s")
    one, other = states
    assert one["replay"] == other["replay"]
    assert one["replay"]["counters"]["num_inserted"] > 16
    assert one["rollout"]["pending"] == other["rollout"]["pending"]
    assert one["rollout"]["engine"]["counters"] == other["rollout"]["engine"]["counters"]
    for name, tensor in one["rollout"]["engine"]["tensors"].items():
        assert torch.equal(tensor, other["rollout"]["engine"]["tensors"][name])


def test_a_resumed_run_takes_its_learning_rate_and_limiter_from_its_configuration(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_of(tiny_overrides, "run"), monkeypatch, stop_after=4)
    now = config_of(
        tiny_overrides,
        "run",
        "learner.optimizer.learning_rate=0.0123",
        "learner.optimizer.schedule=constant",
        "learner.optimizer.warmup_updates=0",
        "replay.samples_per_insert=3",
    )
    assert run(now, monkeypatch)
    lines = [json.loads(line) for line in (now.run.path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["kind"] == "update"]
    assert rates[4:] == [0.0123] * 5
    assert rates[3] < 0.001
    last = now.run.path / "checkpoints" / f"update_{UPDATES:08d}" / "with_surroundings.safetensors"
    assert load_state(last)["replay"]["settings"]["samples_per_insert"] == 3


def in_a_child(config: RunConfig, *, kill_after_s: float | None) -> float:
    """Run in a forked process, killed after a while unless it was faster; the seconds that it lasted."""
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run_inline(config)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    deadline = begun + (150 if kill_after_s is None else kill_after_s)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "the run failed, or was killed by another"
            return time.monotonic() - begun
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert kill_after_s is not None, "the run did not end"
    return time.monotonic() - begun


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_where_it_would_have_ended(tiny_overrides: list[str], kills: int) -> None:
    torch.set_num_threads(1)  # so that nothing runs beside what is forked
    whole, cut = (config_of(tiny_overrides, name, "learner.checkpoint_every=1") for name in ("whole", "cut"))
    lasted = in_a_child(whole, kill_after_s=None)
    draws = random.Random(kills)
    for _ in range(kills):
        in_a_child(cut, kill_after_s=draws.uniform(0.1, 0.9) * lasted)
    in_a_child(cut, kill_after_s=None)
    assert digests(cut) == digests(whole)
