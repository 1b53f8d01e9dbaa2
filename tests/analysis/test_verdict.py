"""What is said of a measured shift."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddil_dist.analysis.results import (
    Analysis,
    Mixture,
    PointShift,
    ShiftResult,
    read_analysis,
    write_analysis,
)
from ddil_dist.analysis.verdict import verdict
from ddil_dist.errors import DataError
from ddil_dist.metrics.intervals import Interval


def about(value: float, spread: float = 0.01) -> Interval:
    return Interval(value, value * (1 - spread), value * (1 + spread))


def point(timestep: int, ratio: Interval, final: float = 1.0, p_visited: float = 0.5) -> PointShift:
    return PointShift(
        timestep=timestep,
        error_forward=about(0.1),
        error_teacher=about(0.1),
        error_visited=about(0.1 * ratio.value),
        ratio=ratio,
        distance_visited=0.2,
        distance_teacher=0.1,
        distance_floor=0.001,
        p_visited=p_visited,
        p_teacher=0.001,
        final_error=about(final),
    )


def shift(overall: Interval | None, *ratios: Interval) -> ShiftResult:
    finals = [1.0, 0.4, 0.25]
    return ShiftResult(
        points=[point(999 - 250 * index, ratio, finals[index]) for index, ratio in enumerate(ratios)], overall=overall
    )


def test_shift_is_said_with_its_place_and_its_size() -> None:
    found = verdict(shift(Interval(1.4, 1.2, 1.6), about(1.0), about(1.6), about(1.2)), num_states=256)
    assert found.answer == "shift"
    assert found.headline.startswith("There is covariate shift")
    assert "1.40 times (95% interval 1.20 to 1.60)" in found.headline
    words = " ".join(found.sentences)
    assert "Surely higher at t = 749, 499; most at t = 749: 1.60" in words
    assert "75% of the final error is gone" in words
    assert "256 trajectories" in words


def test_no_shift_is_said_where_the_interval_leaves_no_room_for_one() -> None:
    found = verdict(shift(Interval(0.9, 0.8, 1.05), about(1.0), about(0.9), about(0.9)), num_states=256)
    assert found.answer == "none"
    assert "Plain distillation" in found.sentences[1]


def test_a_shift_too_small_to_matter_is_called_small() -> None:
    found = verdict(shift(Interval(1.05, 1.02, 1.08), about(1.0), about(1.05), about(1.05)), num_states=256)
    assert found.answer == "shift"
    assert "small" in found.sentences[1]


def test_what_cannot_be_told_is_said_with_what_it_would_take() -> None:
    found = verdict(shift(Interval(1.1, 0.8, 1.4), about(1.0), about(1.1, 0.3), about(1.1, 0.3)), num_states=100)
    assert found.answer == "unsure"
    assert "900 states" in found.sentences[1], "a third of the interval's width, which nine times the states have"


def test_one_step_has_no_shift() -> None:
    found = verdict(shift(None, about(1.0)), num_states=10)
    assert found.answer == "none"
    assert "one step" in found.headline


def test_an_analysis_is_read_as_it_was_written(tmp_path: Path) -> None:
    mixtures = [Mixture(kind="student first", teacher=0.5, timestep=749, metrics={"fid": 2.5})]
    written = Analysis(protocol={"num_states": 3}, shift=shift(about(1.2), about(1.0), about(1.2)), mixtures=mixtures)
    write_analysis(tmp_path / "analysis.json", written)
    assert read_analysis(tmp_path / "analysis.json") == written
    assert mixtures[0].name == "student until t = 749"
    (tmp_path / "analysis.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="not an analysis"):
        read_analysis(tmp_path / "analysis.json")
