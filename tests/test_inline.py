"""A run in one process ends bit for bit where it would have ended, wherever it was stopped and whenever killed."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ddil_dist.config import ReplayConfig, RunConfig, load_config
from ddil_dist.errors import WaitTimeoutError
from ddil_dist.launch import inline
from ddil_dist.launch.inline import run_inline
from ddil_dist.report import write_report
from ddil_dist.types import Draw, StateSource
from learner.state_file import load_state
from tests.data.support import encoded, write_rows
from tests.learner.support import make_state

UPDATES = 9
EXACT = ("student.safetensors", "average.safetensors", "trainer.safetensors", "worker_0.safetensors")


def config_of(overrides: list[str], name: str, *more: str) -> RunConfig:
    return load_config(
        None,
        [*overrides, f"run.name={name}", f"learner.updates={UPDATES}", "learner.publish_every=4", *more],
    )


class Stop:
    """Comes after so many updates, before each of which it is asked for; 0: never."""

    def __init__(self, updates: int) -> None:
        self._left = updates or -1

    def is_set(self) -> bool:
        self._left -= 1
        return self._left == -1


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


@pytest.mark.parametrize("forward", [(0.0, 0.9), (1.0, 0.1)])
def test_a_part_may_want_what_the_one_before_did_without(
    tiny_overrides: list[str], forward: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [f"{{until: {u}, forward: {f}, student: {(1 - f) / 2}, teacher: {(1 - f) / 2}}}" for u, f in
             zip((0.5, 1.0), forward, strict=True)]  # fmt: skip
    config = config_of(
        tiny_overrides,
        "grows",
        f"prior.parts=[{', '.join(parts)}]",
        "learner.updates=30",
        "learner.publish_every=4",  # versions know of the second part from update 16 on, which begins at 15
        "learner.sample_timeout_s=5",
    )
    assert run(config, monkeypatch)
    lines = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
    sources = [set(line["sources"]) for line in lines if line["kind"] == "update"]
    new = {"FORWARD"} if not forward[0] else {"STUDENT", "TEACHER"}
    assert not any(new & kinds for kinds in sources[:16])
    assert set.union(*sources[16:]) >= new


class Scripted:
    """Rolls out forward states, and from the `student_from`-th on the student's."""

    def __init__(self, replay: inline.RolloutOnDemand, *, student_from: int) -> None:
        self._replay = replay
        self._student_from = student_from
        self.made = 0

    def work(self, *, should_stop: Callable[[], bool] = lambda: False) -> int:
        if should_stop():
            return 0
        student = self.made >= self._student_from
        source = StateSource.STUDENT if student else StateSource.FORWARD
        state = make_state(self.made, source=source, labelled=True, version=1 if student else None)
        self._replay.insert(state, writer="w", batch_id=self.made, timeout_s=0.1)
        self.made += 1
        return 1


@pytest.mark.parametrize("student_from", [6, 1000])
def test_what_a_draw_wants_is_rolled_out_as_far_as_the_limiter_admits(student_from: int) -> None:
    settings = ReplayConfig(capacity=1000, min_size=2, samples_per_insert=1.0, error_buffer=16.0)
    replay = inline.RolloutOnDemand(settings, 0)
    rollout = Scripted(replay, student_from=student_from)
    replay.rollout, replay.insert_batch = rollout, 1  # type: ignore[assignment]
    draws = [Draw(3, frozenset({StateSource.STUDENT}))]
    if student_from == 6:
        assert set(replay.sample(draws, timeout_s=100).source) == {StateSource.STUDENT}
        assert rollout.made == 7
    else:
        with pytest.raises(WaitTimeoutError, match="none of the 18 live states is of source student"):
            replay.sample(draws, timeout_s=100)
        assert rollout.made == 18, "min_size and the error buffer"


CHILDREN = multiprocessing.get_context("forkserver")
"""Forks of a process that has imported what a run needs, and in which nothing ever ran."""
CHILDREN.set_forkserver_preload(["ddil_dist.launch.inline", "learner.assemble", "diffusers"])


def in_a_child(config: RunConfig, *, kill_after_s: float | None) -> float:
    """Run in a process of its own, killed after a while unless it was faster; the seconds that it lasted."""
    begun = time.monotonic()
    child = CHILDREN.Process(target=run_inline, args=(config,))
    child.start()
    child.join(150 if kill_after_s is None else kill_after_s)
    if child.is_alive():
        assert kill_after_s is not None, "the run did not end"
        child.kill()
        child.join()
    else:
        assert child.exitcode == 0, "the run failed, or was killed by another"
    return time.monotonic() - begun


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_where_it_would_have_ended(tiny_overrides: list[str], kills: int) -> None:
    whole, cut = (config_of(tiny_overrides, name, "learner.checkpoint_every=1") for name in ("whole", "cut"))
    lasted = in_a_child(whole, kill_after_s=None)
    draws = random.Random(kills)
    for _ in range(kills):
        in_a_child(cut, kill_after_s=draws.uniform(0.1, 0.9) * lasted)
    in_a_child(cut, kill_after_s=None)
    assert digests(cut) == digests(whole)


@pytest.mark.parametrize("labels", ["actors", "learner"])
def test_skipped_rows_of_the_data_are_told_in_the_journal_and_the_report(
    tiny_overrides: list[str], labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [(encoded((40 * row, 90, 0)), f"row {row}") for row in range(4)]
    write_rows(tmp_path / "d.parquet", [*good, (b"broken", "x"), (encoded((1, 2, 3)), " ")])
    more = (f"data.path={tmp_path / 'd.parquet'}", f"rollout.labels={labels}", "evaluation.num_images=0")
    config = config_of(tiny_overrides, "told", *more)
    assert run(config, monkeypatch)
    lines = [json.loads(line) for line in (config.run.path / "events.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [(line["num_skipped"], line["num_rows"]) for line in skipped] == [(2, 6)]
    page = write_report(config.run.path).read_text(encoding="utf-8")
    assert "2 of 6 rows of the data were skipped: " in page
