"""The monitor: what it says of a run, and that it needs nothing but the run's server and name."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ddil_dist.config import ReplayConfig
from ddil_dist.control import RunControl
from ddil_dist.monitor.metrics import render
from ddil_dist.monitor.report import compare
from ddil_dist.monitor.screen import Screen
from ddil_dist.monitor.snapshot import Snapshot
from ddil_dist.replay import EmbeddedServer, RedisReplay
from ddil_dist.types import NO_POLICY, Draw, ReplayStats, StateSource, WeightsVersion
from tests.replay.support import make_states

STATS = ReplayStats(
    size=1000,
    size_bytes=4_000_000,
    capacity=2000,
    num_inserted=5000,
    num_sampled=20_000,
    num_refused=3,
    by_source={StateSource.FORWARD: 500, StateSource.STUDENT: 100, StateSource.TEACHER: 400},
    by_version={NO_POLICY: 600, 40: 100, 100: 100, 120: 200},
    by_timestep={250: 250, 500: 250, 749: 250, 999: 250},
    sampled_by_source={StateSource.STUDENT: 15_000, StateSource.TEACHER: 5000},
    num_unused=200,
    inserted_by_timestep={250: 1000, 500: 1000, 749: 1000, 999: 2000},
    used_by_timestep={250: 1000, 500: 900, 749: 900, 999: 1200},
    inserted_by_actor={"actor-0": 4000, "actor-1": 1000},
    used_by_actor={"actor-0": 3900, "actor-1": 100},
    capacity_bytes=8_000_000,
    settings={"samples_per_insert": 4.0, "min_size": 256, "error_buffer": 500.0, "max_staleness": None},
    cursor=0.0,
    cursor_bounds=(-100.0, 900.0),
    waits_s={"sample for inserts": 50.0, "insert for samples": 4.0},
    incarnation="i-1",
    num_samplers=1,
    num_inserters=2,
    weights=WeightsVersion(version=120, progress=0.3, digest="d", size_bytes=7_000_000, dtype="float32"),
)
SKIPPED = {"num_rows": 5000, "num_skipped": 12, "skipped": {"no caption": 12}}
BEAT = {"writer": "actor-0.1", "version": 120, "states": 900, "alive_s": 30.0, "insert_wait_s": 3.0, "time": 1009.0}
EARLIER = {**BEAT, "states": 500, "alive_s": 20.0, "insert_wait_s": 1.0, "time": 999.0}
BEFORE = Snapshot(
    time=1000.0,
    replay=replace(STATS, num_inserted=4000, num_sampled=19_000, waits_s={"sample for inserts": 43.7}),
    actors={"actor-0": EARLIER},
    wanted_actors=2,
    learner={},
    stop_reason=None,
)
AFTER = Snapshot(
    time=1010.0,
    replay=STATS,
    actors={"actor-0": BEAT, "actor-1": {**BEAT, "version": 100, "writer": "actor-1.4", "time": 900.0}},
    wanted_actors=2,
    learner={"phase": "training", "update": 125, "total_updates": 400, "loss": 0.5, "prior": {"student": 0.4}},
    stop_reason=None,
)


def text_of(report: dict[str, Any], width: int, height: int = 25) -> str:
    console = Console(file=StringIO(), width=width, height=height, color_system=None)
    console.print(Screen(report))
    written = console.file
    assert isinstance(written, StringIO)
    return written.getvalue()


def test_the_gist_fits_the_smallest_terminal() -> None:
    learner = {**AFTER.learner, "updates_per_s": 1.25, "elapsed_s": 100.0, "left_s": 4000.0, "wait_share": 0.3}
    beats = {f"actor-{number}": BEAT for number in range(30)}
    report = compare(BEFORE, replace(AFTER, learner=learner, actors=beats), "demo")
    console = Console(file=StringIO(), width=80, height=24, color_system=None)
    console.print(Screen(report))
    written = console.file
    assert isinstance(written, StringIO)
    lines = written.getvalue().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    text = written.getvalue()
    for words in ("update 125 of 400", "for 1 min 40 s, 1 h 6 min left", "version 120", "timesteps  999: 250",
                  "teacher 40%", "actor-0", "30 heard", "more are not shown"):  # fmt: skip
        assert words in text


class TestReport:
    REPORT = compare(BEFORE, AFTER, "demo")

    def test_rates_are_over_the_time_between(self) -> None:
        replay = self.REPORT["replay"]
        assert (replay["inserts_per_s"], replay["samples_per_s"]) == (100.0, 100.0)
        assert replay["share_by_source"] == {"forward": 0.5, "student": 0.1, "teacher": 0.4}
        assert replay["sampled_share_by_source"] == {"student": 0.75, "teacher": 0.25}
        assert replay["wanted_share"] == {"student": 0.4}

    def test_the_bottleneck_is_told_in_words(self) -> None:
        assert self.REPORT["bottleneck"] == "learner waits for inserts 63%"

        def told(**changes: Any) -> str:
            return str(compare(BEFORE, replace(AFTER, replay=replace(STATS, **changes)), "demo")["bottleneck"])

        assert told(waits_s={"insert for samples": 16.0}) == "actors wait for the learner to sample 80%"  # two of them
        assert told(waits_s={"sample for server": 9.0}) == "learner waits for the Redis server to answer 90%"
        calm = {"waits_s": {"sample for inserts": 44.0}}
        assert told(**calm) == "nobody waits for the buffer"
        assert told(**calm, num_inserters=0) == "nobody inserts"
        assert told(**calm, num_inserters=0, num_samplers=0) == "nobody inserts and nobody samples (learner: training)"
        assert "no replay buffer" in compare(BEFORE, replace(AFTER, replay=None), "demo")["bottleneck"]

    def test_ages_are_binned_in_student_updates(self) -> None:
        bins = {b["label"]: b["num"] for b in self.REPORT["replay"]["ages"]}
        assert bins == {"no policy": 600, "0-19": 200, "20-39": 100, "40-59": 0, "60-79": 0, "80-99": 100}

    def test_the_limiter_is_told_in_words(self) -> None:
        def told(**changes: Any) -> str:
            changed = replace(AFTER, replay=replace(STATS, **changes))
            return str(compare(BEFORE, changed, "demo")["replay"]["limiter"]["state"])

        assert told() == "open to both"
        assert told(cursor=-99.0) == "samples wait for inserts"
        assert told(cursor=899.0) == "inserts wait for samples"
        assert told(size=99) == "filling: 99 of 256 states before the first sample"

    def test_actors_have_rates_versions_and_silence(self) -> None:
        one, two = self.REPORT["actors"]
        assert (one["state"], one["states_per_s"], one["waiting_share"], one["versions_behind"]) == (
            "alive",
            40,
            0.2,
            0,
        )
        assert (two["state"], two["states_per_s"], two["versions_behind"]) == ("silent", 30, 20)
        assert self.REPORT["weights"]["applied_by"] == ["actor-0"]

    def test_states_that_no_sample_has_had_are_told_by_timestep_and_actor(self) -> None:
        found = self.REPORT["replay"]["never_sampled"]
        assert (found["num"], found["share"], found["live"]) == (1000, 0.2, 200)
        assert found["by_timestep"]["999"] == {"inserted": 2000, "num": 800}
        assert found["by_actor"]["actor-1"] == {"inserted": 1000, "num": 900}
        assert [actor["never_sampled"] for actor in self.REPORT["actors"]] == [0.025, 0.9]
        assert "20%, 200 of them live" in text_of(self.REPORT, 120, 60)
        assert "40% never sampled" in text_of(self.REPORT, 120, 60)
        assert "20% (most: 999 40%, actor-1 90%)" in text_of(self.REPORT, 80)
        lines = dict(line.rsplit(" ", 1) for line in render(self.REPORT, {}).splitlines() if line[0] != "#")
        assert float(lines['ddil_replay_never_sampled_states{run="demo"}']) == 1000
        assert float(lines['ddil_replay_never_sampled_ratio{run="demo",timestep="999"}']) == 0.4
        assert float(lines['ddil_replay_never_sampled_ratio_worst_actor{run="demo"}']) == 0.9
        before = compare(BEFORE, replace(AFTER, replay=replace(STATS, inserted_by_timestep={})), "demo")
        assert before["replay"]["never_sampled"] is None
        assert "unsampled  " not in text_of(before, 120, 60).replace("unsampled  heard", "") + text_of(before, 80)

    def test_skipped_rows_are_told_where_there_are_any(self) -> None:
        assert self.REPORT["skipped"] is None
        assert "skipped" not in text_of(self.REPORT, 120)
        assert "rows_skipped" not in render(self.REPORT, {})
        actors = {"actor-0": {**BEAT, "data": SKIPPED}, "actor-1": {**BEAT, "data": None}}
        learner = {**AFTER.learner, "data": {"num_rows": 5000, "num_skipped": 7}}
        report = compare(BEFORE, replace(AFTER, actors=actors, learner=learner), "demo")
        assert report["skipped"] == SKIPPED
        words = "12 of 5,000 rows of the data were skipped: 12 with no caption"
        assert words in text_of(report, 120)
        assert 'ddil_data_rows_skipped{run="demo"} 12.0\n' in render(report, {})

    def test_another_incarnation_counts_from_zero(self) -> None:
        other = replace(AFTER, replay=replace(STATS, incarnation="i-2", num_inserted=50))
        assert compare(BEFORE, other, "demo")["replay"]["inserts_per_s"] == 0.0

    def test_it_is_plain_json(self) -> None:
        assert json.loads(json.dumps(self.REPORT)) == self.REPORT


class TestScreen:
    @pytest.mark.parametrize("width", [40, 60, 99, 100, 160])
    def test_it_keeps_to_its_width_and_says_what_matters(self, width: int) -> None:
        text = text_of(TestReport.REPORT, width)
        assert max(map(len, text.splitlines())) <= width
        for word in ("demo", "waits for inserts", "63%", "teacher", "999", "version 120", "actor-1", "silent"):
            assert word in text

    def test_a_run_without_a_buffer_is_one_line(self) -> None:
        text = text_of(compare(BEFORE, replace(AFTER, replay=None), "demo"), 80)
        assert "no replay buffer" in text


class TestMetrics:
    def test_they_are_named_for_prometheus_with_few_labels(self) -> None:
        text = render(TestReport.REPORT, dict(STATS.waits_s))
        lines = {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        }
        assert lines['ddil_replay_states{run="demo"}'] == 1000
        assert lines['ddil_replay_source_states{run="demo",source="teacher"}'] == 400
        assert lines['ddil_replay_waiting_seconds_total{run="demo",who="sample",whom="inserts"}'] == 50
        assert lines['ddil_actors{run="demo",state="silent"}'] == 1
        assert lines['ddil_actors_on_newest_version{run="demo"}'] == 1
        assert lines['ddil_learner_updates_total{run="demo"}'] == 125
        assert len(lines) < 50
        assert "actor-0" not in text
        for line in text.splitlines():
            if line.startswith("# TYPE"):
                _, _, name, kind = line.split()
                assert name.endswith("_total") == (kind == "counter")


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`runs/` with a run named `watched` that is going on, as far as Redis is concerned."""
    directory = tmp_path_factory.mktemp("runs")
    with EmbeddedServer() as server:
        url = server.start(directory / "watched" / "redis")
        replay = RedisReplay(ReplayConfig(min_size=1, error_buffer=1e6), url, run="watched", seed=0)
        replay.insert(make_states(0, 30), writer="w", batch_id=0, timeout_s=5)
        replay.sample([Draw(10)], timeout_s=5)
        control = RunControl.from_url(url, "watched")
        control.set_wanted_actors(1)
        control.heartbeat("actor-0", {"writer": "actor-0.1", "version": 0, "states": 30, "alive_s": 2.0})
        control.set_learner_status({"phase": "training", "update": 3, "total_updates": 9})
        replay.note_weights(WeightsVersion(0, 0.0, "d", 10, "float32"))
        yield directory
        control.close()
        replay.close()


def monitor(directory: Path, *arguments: str, run: str = "watched") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddil_dist.monitor", "--directory", str(directory), "--run", run, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.integration
class TestCommand:
    def test_json_is_one_report(self, run_directory: Path) -> None:
        done = monitor(run_directory, "--json", "--interval", "0.1")
        assert (done.returncode, done.stderr) == (0, "")
        report = json.loads(done.stdout)
        assert (report["replay"]["size"], report["replay"]["num_sampled"]) == (30, 10)
        assert report["learner"]["update"] == 3
        assert report["weights"]["applied_by"] == ["actor-0"]
        assert report["actors"][0]["states_per_s"] == 15.0

    def test_watch_is_a_line_a_report(self, run_directory: Path) -> None:
        command = [sys.executable, "-m", "ddil_dist.monitor", "--directory", str(run_directory), "--run", "watched"]
        process = subprocess.Popen([*command, "--watch", "--interval", "0.1"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        sizes = [json.loads(process.stdout.readline())["replay"]["size"] for _ in range(3)]
        process.stdout.close()  # the reader leaves: the monitor ends quietly
        assert process.wait(10) == 0
        assert sizes == [30, 30, 30]

    def test_serve_answers_prometheus(self, run_directory: Path) -> None:
        command = [sys.executable, "-m", "ddil_dist.monitor", "--directory", str(run_directory), "--run", "watched"]
        process = subprocess.Popen([*command, "--serve", "0"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[-1]
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert 'ddil_replay_states{run="watched"} 30' in answer.read().decode()
            with pytest.raises(urllib.error.HTTPError, match="404") as missing:
                urllib.request.urlopen(address.replace("/metrics", "/else"), timeout=10)
            missing.value.close()
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()

    def test_settings_change_on_the_running_run(self, run_directory: Path) -> None:
        done = monitor(run_directory, "--set", "samples_per_insert=2.5", "--set", "max_staleness=40")
        assert done.returncode == 0
        assert "samples_per_insert: 2.5" in done.stdout
        report = json.loads(monitor(run_directory, "--json", "--interval", "0.1").stdout)
        settings = report["replay"]["limiter"]["settings"]
        assert (settings["samples_per_insert"], settings["max_staleness"]) == (2.5, 40)
        refused = monitor(run_directory, "--set", "samples_per_insert=0")
        assert refused.returncode == 2
        assert "replay.samples_per_insert: 0.0; it must be a positive number" in refused.stderr

    def test_an_unknown_run_is_told_apart_from_an_unreachable_server(self, run_directory: Path) -> None:
        done = monitor(run_directory, "--json", run="nobody")
        assert done.returncode == 2
        assert "give --url" in done.stderr
        url = json.loads((run_directory / "watched" / "redis" / "server.json").read_text())["url"]
        report = json.loads(monitor(run_directory, "--url", url, "--json", "--interval", "0.1", run="nobody").stdout)
        assert report["replay"] is None
        gone = monitor(run_directory, "--url", "redis://:secret@127.0.0.1:1", "--json")
        assert gone.returncode == 2
        assert "127.0.0.1:1 cannot be reached" in gone.stderr
        assert "secret" not in gone.stderr

    def test_it_imports_neither_torch_nor_ray(self) -> None:
        script = (
            "import sys, ddil_dist.monitor.__main__, ddil_dist.monitor.screen, ddil_dist.monitor.metrics\n"
            "import ddil_dist.monitor.report, ddil_dist.control, ddil_dist.replay\n"
            "print([name for name in ('torch', 'ray', 'diffusers') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "[]"
