"""The whole system in small, as its user starts it: real Ray, real Redis, real signals, real exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from ddil_dist.control import RunControl
from ddil_dist.journal import read_journal
from ddil_dist.replay import EmbeddedServer
from ddil_dist.replay.server import read_url
from tests.integration.support import command, environment, nothing_left_behind, run_directory, wait_for

pytestmark = pytest.mark.integration


def launch(*arguments: str, env: dict[str, str] | None = None, timeout_s: float = 200) -> CompletedProcess[str]:
    return command("ddil_dist.launch", *arguments, env=env or environment(), timeout_s=timeout_s)


@pytest.fixture
def own_environment() -> Iterator[dict[str, str]]:
    """No server and no Ray process outlives what the test starts in it."""
    with nothing_left_behind() as env:
        yield env


@pytest.fixture
def ray_overrides(tiny_overrides: list[str]) -> list[str]:
    return [item for item in tiny_overrides if not item.startswith("run.execution")] + ["run.execution=ray"]


def test_distributed_run_trains_on_what_its_actors_saw_and_exports_a_stock_student(
    ray_overrides: list[str], own_environment: dict[str, str]
) -> None:
    evaluation = ("evaluation.num_images=8", "evaluation.batch_size=8", "evaluation.grid_images=4")
    done = launch(*ray_overrides, *evaluation, env=own_environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory of an update, as estimated:" in done.stdout, "what the learner's worker logs is told to people"
    run = run_directory(ray_overrides)

    updates = [line for line in read_journal(run / "metrics.jsonl") if line["kind"] == "update"]
    assert [line["update"] for line in updates] == [1, 2, 3, 4, 5, 6]
    assert all(sum(line["sources"].values()) == 8 for line in updates)
    published = [line["version"] for line in read_journal(run / "metrics.jsonl") if line["kind"] == "publish"]
    assert published[0] == 0
    assert published == sorted(set(published) & {0, 2, 4, 6}), "one that is due while another is on its way is left out"
    events = read_journal(run / "events.jsonl")
    assert {line["kind"] for line in events} >= {"phase", "replay", "rollout", "applied"}
    assert max(line["num_inserted"] for line in events if line["kind"] == "replay") >= 16

    results = json.loads((run / "results.json").read_text())
    assert [policy["name"] for policy in results["policies"]] == [
        "teacher, 8 steps",
        "teacher, 4 steps",
        "student before, 4 steps",
        "student, 4 steps",
    ]
    assert results["export_max_abs_difference"] < 1e-4
    assert (run / "report.html").stat().st_size > 10_000

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(run / "student")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a red square", num_inference_steps=4, generator=generator, output_type="np").images[0]
    assert image.shape == (16, 16, 3)
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 500, 250]


def last_update(run: Path) -> int:
    return max(line["update"] for line in read_journal(run / "metrics.jsonl") if line["kind"] == "update")


def actor_beat(run: Path) -> dict[str, Any]:
    """The newest heartbeat of the run's first actor; empty if there is none yet."""
    url = read_url(run / "redis")
    assert url is not None
    control = RunControl.from_url(url, "tiny")
    try:
        return control.heartbeats().get("actor-0", {})
    finally:
        control.close()


def test_killed_actor_is_replaced_and_an_interrupted_run_resumes(
    ray_overrides: list[str], own_environment: dict[str, str]
) -> None:
    overrides = [*ray_overrides, "learner.updates=100000", "learner.checkpoint_every=100000"]
    run = run_directory(ray_overrides)
    process = subprocess.Popen(
        [sys.executable, "-m", "ddil_dist.launch", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=own_environment,
    )

    def updated() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return any(line["kind"] == "update" for line in read_journal(run / "metrics.jsonl"))

    try:
        wait_for(updated, timeout_s=150, what="the first update")
        wait_for(lambda: "pid" in actor_beat(run), timeout_s=30, what="the actor beats")
        os.kill(actor_beat(run)["pid"], signal.SIGKILL)
        wait_for(lambda: actor_beat(run).get("writer") == "actor-0.2", timeout_s=60, what="another actor beats")
        server = int((run / "redis" / "redis.pid").read_text())
        os.kill(server, signal.SIGKILL)
        reached = last_update(run)
        wait_for(lambda: last_update(run) > reached + 5, timeout_s=60, what="the learner goes on with a new server")
        assert int((run / "redis" / "redis.pid").read_text()) != server
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "actor-0.1 died" in output
    assert "run the same command again to resume" in output
    (checkpoint,) = (run / "checkpoints").iterdir()
    reached = int(checkpoint.name.removeprefix("update_"))
    assert reached > 0

    done = launch(*overrides, f"learner.updates={reached + 4}", env=own_environment)
    assert done.returncode == 0, done.stdout + done.stderr
    updates = [line["update"] for line in read_journal(run / "metrics.jsonl") if line["kind"] == "update"]
    assert updates == list(range(1, reached + 5))


def test_a_run_without_actors_waits_and_stops_at_a_checkpoint_when_told(
    ray_overrides: list[str], own_environment: dict[str, str]
) -> None:
    overrides = [*ray_overrides, "rollout.actors=0"]
    run = run_directory(ray_overrides)
    process = subprocess.Popen(
        [sys.executable, "-m", "ddil_dist.launch", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=own_environment,
    )

    def phase() -> str:
        assert process.poll() is None, process.communicate()[0]
        url = read_url(run / "redis")
        if url is None:
            return ""
        control = RunControl.from_url(url, "tiny")
        try:
            return str(control.learner_status().get("phase"))
        finally:
            control.close()

    try:
        wait_for(lambda: phase() == "waiting for states", timeout_s=150, what="the learner waits")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["update_00000000"]


@pytest.mark.slow
def test_a_run_whose_redis_stays_away_fails_and_says_so(
    ray_overrides: list[str], own_environment: dict[str, str], tmp_path: Path
) -> None:
    run = run_directory(ray_overrides)
    with EmbeddedServer() as server:
        overrides = [*ray_overrides, "learner.updates=1000000", "learner.sample_timeout_s=3"]
        process = subprocess.Popen(
            [sys.executable, "-m", "ddil_dist.launch", *overrides, f"redis.url={server.start(tmp_path / 'redis')}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=own_environment,
        )
        try:
            wait_for(lambda: (run / "checkpoints").is_dir(), timeout_s=150, what="the first checkpoint")
            server.stop()
            output, _ = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 1, output
    assert re.search(r"the learner failed: WaitTimeoutError: .* for the replay server 127\.0\.0\.1:\d+", output), output
    assert "stopped at a checkpoint" not in output


def test_inline_run_is_deterministic(tiny_overrides: list[str]) -> None:
    losses = []
    for name in ("first", "second"):
        done = launch(*tiny_overrides, f"run.name={name}")
        assert done.returncode == 0, done.stdout + done.stderr
        directory = run_directory(tiny_overrides).with_name(name)
        lines = read_journal(directory / "metrics.jsonl")
        losses.append([line["loss"] for line in lines if line["kind"] == "update"])
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]

    # A run that is trained is finished again, not trained again.
    (run_directory(tiny_overrides).with_name("first") / "report.html").unlink()
    done = launch(*tiny_overrides, "run.name=first")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_journal(run_directory(tiny_overrides).with_name("first") / "metrics.jsonl")
    assert [line["loss"] for line in lines if line["kind"] == "update"] == losses[0]
    assert (run_directory(tiny_overrides).with_name("first") / "report.html").is_file()


def test_a_curriculum_runs_stage_by_stage_each_from_the_last(tiny_overrides: list[str], tmp_path: Path) -> None:
    stages = """
curriculum:
  stages:
    - {objective: {type: guidance}, student: {steps: 8}, learner: {updates: 2}}
    - {student: {steps: 4}, learner: {updates: 3}}
    - {student: {steps: 2}, learner: {updates: 4}}
"""
    (tmp_path / "stages.yaml").write_text(stages)
    settings = ["--config", str(tmp_path / "stages.yaml"), *tiny_overrides]
    run = run_directory(tiny_overrides)
    done = launch(*settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("ddil_dist: stage")] == [
        "ddil_dist: stage 1 of 3: guidance, 8 steps",
        "ddil_dist: stage 2 of 3: progressive, 4 steps",
        "ddil_dist: stage 3 of 3: progressive, 2 steps",
    ]
    assert (run / "student").resolve() == run / "tiny_stage_3" / "student"

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(run / "student")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red square", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (16, 16, 3)
    assert pipeline.scheduler.timesteps.tolist() == [999, 500]

    # A stage that was killed before its end is finished again; one that is whole is left alone.
    (run / "tiny_stage_3" / ".finished").unlink()
    again = launch(*settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("finished before") == 2
    lines = read_journal(run / "tiny_stage_3" / "metrics.jsonl")
    assert [line["update"] for line in lines if line["kind"] == "update"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("learner.update=3", "learner.update: unknown key (value 3); did you mean learner.updates?"),
        ("learner.updates=0", "learner.updates: Input should be greater than 0 (got 0)"),
        ("student.steps=5", "teacher.steps: 8 is not a multiple of student.steps (5)"),
        ("teacher.pipeline=/nowhere", "teacher.pipeline: no directory at '/nowhere'"),
        ("data.path=/nowhere", "data.path: no file or directory at '/nowhere'"),
        ("redis.url=redis://127.0.0.1:1", "127.0.0.1:1 cannot be reached"),
        ("rollout.label_selector.pool=rollouts", "rollout.label_selector: no node has {'pool': 'rollouts'}"),
        ("rollout.resources.unobtainium=1", "unobtainium: the run needs 1, the cluster has 0"),
    ],
)
def test_bad_input_is_refused_with_one_message_before_any_work(
    ray_overrides: list[str], own_environment: dict[str, str], override: str, complaint: str
) -> None:
    done = launch(*ray_overrides, override, env=own_environment, timeout_s=100)
    assert done.returncode == 2, done.stdout + done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_directory(ray_overrides) / "metrics.jsonl").exists()


def test_help_and_dry_run_answer_without_importing_torch() -> None:
    script = "import sys; sys.argv[1:] = {}; from ddil_dist.launch.__main__ import main\n"
    script += "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    for arguments in (["--help"], ["--dry-run"]):
        done = subprocess.run(
            [sys.executable, "-c", script.format(arguments)], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.rstrip().endswith("False"), done.stdout
