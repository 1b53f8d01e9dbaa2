"""Results: round trips, ranking, the file and the terminal's table."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from ddil_dist.errors import DataError
from ddil_dist.metrics.protocol import ABSENT, METRICS, PolicyResult, Protocol, Role, best_names, present_metrics
from ddil_dist.metrics.results import Results, read_results, write_results
from ddil_dist.metrics.table import results_table

FID, CLIP = METRICS[0], METRICS[1]


def policy(name: str, role: Role = "student", steps: int = 4, **metrics: float) -> PolicyResult:
    protocol = Protocol(
        sampler="DDIM", steps=steps, nfes_per_image=steps, guidance_scale=3.0, seed=1, num_images=500,
        feature_network="builtin-classifier", resize="none", clip_model="builtin-clip",
    )  # fmt: skip
    return PolicyResult(name=name, role=role, protocol=protocol, metrics=metrics, seconds_per_image=0.01234)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    results = Results(
        [policy("student ü", fid=1.5), policy("teacher", "teacher", 32)], {"export_max_abs_difference": 0.0}
    )
    write_results(tmp_path / "run" / "results.json", results)
    assert read_results(tmp_path / "run" / "results.json") == results
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["results.json"]


def test_a_metric_that_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", Results([policy("student", fid=math.nan)]))
    plain = json.loads((tmp_path / "results.json").read_text())
    assert plain["policies"][0]["metrics"] == {"fid": None}
    assert math.isnan(read_results(tmp_path / "results.json").policies[0].metrics["fid"])


@pytest.mark.parametrize("text", ["", "[]", '{"policies": [{"name": "x"}]}', '{"rows": []}'])
def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match="not a results file"):
        read_results(tmp_path / "results.json")


def test_the_best_is_lowest_or_highest_as_the_metric_asks_and_never_the_teacher() -> None:
    rows = [
        policy("teacher", "teacher", fid=1.0, clip_score=0.9),
        policy("a", fid=2.0, clip_score=0.2),
        policy("b", "baseline", fid=2.00004, clip_score=0.3),
        policy("c", fid=math.nan),
    ]
    assert best_names(rows, FID) == {"a", "b"}  # equal in the digits shown
    assert best_names(rows, CLIP) == {"b"}
    assert best_names(rows[:1], FID) == set()
    assert present_metrics(rows) == [FID, CLIP]


def test_the_table_shows_every_policy_and_marks_the_best() -> None:
    rows = [policy("teacher [32]", "teacher", 32, fid=1.25), policy("student", fid=2.5), policy("plain", "baseline")]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(results_table(rows))
    lines = console.export_text(styles=True).splitlines()
    teacher, student, plain = (
        next(line for line in lines if name in line) for name in ("teacher [32]", "student", "plain")
    )
    assert "32" in teacher
    assert "1.250" in teacher
    assert "\x1b[1;32m2.500" in student
    assert "0.0123" in student
    assert ABSENT in plain


def test_the_built_in_pipelines_metrics_fit_80_columns() -> None:
    """Every policy on a line of its own, nothing cut off."""
    measured = {"fid": 12.345, "clip_score": 0.7181, "agreement": 0.914, "density": 0.951, "coverage": 0.872}
    rows = [
        policy("teacher, 32 steps", "teacher", 32, **measured),
        policy("student before, 4 steps", "baseline", paired_trajectory_error=0.0411, **measured),
        policy("best, update 10000", paired_trajectory_error=0.0311, **measured),
    ]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(results_table(rows))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert len(lines) == 3 + len(rows)
    assert " ".join(lines[0]) == "CLIP agree- paired den- cover-"
    assert " ".join(lines[1]) == "policy NFEs FID ↓ score ↑ ment ↑ error ↓ sity ↑ age ↑ s/image"
    numbers = ["4", "12.345", "0.7181", "0.914", "0.0411", "0.951", "0.872", "0.0123"]
    assert lines[4] == ["student", "before,", "4", "steps", *numbers]
    assert lines[5] == ["best,", "update", "10000", *(number.replace("0.0411", "0.0311") for number in numbers)]


def test_the_terminals_table_has_the_columns_that_have_values() -> None:
    def columns(**metrics: float) -> list[str]:
        table = results_table([policy("student", **metrics)])
        return [str(column.header).split()[0] for column in table.columns]

    assert columns(paired_trajectory_error=0.1) == ["policy", "NFEs", "paired", "s/image"]
    assert columns(fid=2.0, density=1.0) == ["policy", "NFEs", "FID", "den-", "s/image"]
