"""Series against hand-counted lines."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddil_dist.report.series import (
    ActiveClock,
    Delay,
    bands,
    column,
    covering,
    moving_average,
    picked,
    publish_delays,
    rates,
    shares,
    thinned,
    version_map,
)


def test_a_column_is_nan_where_a_line_has_no_number() -> None:
    lines = [{"loss": 1}, {}, {"loss": None}, {"loss": "x"}, {"loss": True}, {"by": {"A": 2.5}}]
    np.testing.assert_array_equal(column(lines, "loss"), [1, *[math.nan] * 5])
    np.testing.assert_array_equal(column(lines, "by", "A"), [*[math.nan] * 5, 2.5])


def test_thinning_averages_equal_runs_and_drops_what_is_not_finite() -> None:
    x, y = thinned(np.arange(7.0), np.array([1, 3, math.nan, 5, 7, 9, 11]), limit=3)
    assert x.tolist() == [0.5, 3.5, 5.5]
    assert y.tolist() == [2, 6, 10]


def test_moving_average_leaves_out_what_is_not_finite() -> None:
    smooth = moving_average(np.array([0, 3, math.nan, 9, 12.0]), 3)
    np.testing.assert_allclose(smooth, [1.5, 1.5, 6, 10.5, 10.5])
    assert np.isnan(moving_average(np.array([math.nan, math.nan]), 1)).all()


def test_shares_pool_counts_before_dividing() -> None:
    lines = [{"s": {"A": 1, "B": 3}}, {"s": {"A": 9, "B": 3}}, {}, {"s": {"A": 0}}]
    pooled = shares(lines, "s", np.arange(4.0), ("A", "B"), bins=2)
    np.testing.assert_allclose(pooled.x, [0.5, 2.5])
    np.testing.assert_allclose(pooled.values, [[10 / 16, 0], [6 / 16, 0]])


def test_version_map_counts_who_made_the_states() -> None:
    lines = [
        {"update": 1, "policy_versions": {"-1": 6, "0": 2}},
        {"update": 2, "policy_versions": {"-1": 4, "0": 4}},
        {"update": 3, "policy_versions": {"-1": 2, "0": 2, "2": 4}},
    ]
    found = version_map(lines)
    assert found is not None
    np.testing.assert_allclose(found.shares, [[2 / 8, 4 / 8, 2 / 8], [0, 0, 4 / 8]])
    assert found.version_range == (0, 4)
    assert found.num_versions == 2
    assert found.student_share == pytest.approx(12 / 24)
    assert found.trained_share == pytest.approx(4 / 12)
    assert found.mean_lag == pytest.approx((2 * 1 + 4 * 2 + 2 * 3 + 4 * 1) / 12)


def test_without_student_states_there_is_no_version_map() -> None:
    assert version_map([{"update": 1, "policy_versions": {"-1": 8}}, {"update": 2}]) is None


def test_delays_pair_publications_with_their_use() -> None:
    published = [{"version": 0, "time": 10.0}, {"version": 20, "time": 30.0}]
    applied = [
        {"version": 0, "time": 11.5, "actor": "a"},
        {"version": 20, "time": 29.9, "actor": "b"},  # another machine's clock
        {"version": 40, "time": 50.0, "actor": "b"},  # its publication is not written yet
        {"version": 20, "actor": "c"},
    ]
    assert publish_delays(published, applied) == [Delay(0, "a", 10.0, 1.5), Delay(20, "b", 30.0, 0.0)]


def test_the_clock_stands_still_while_a_run_is_stopped() -> None:
    times = [*range(100, 200, 10), *range(5000, 5100, 10)]
    clock = ActiveClock([*times, math.nan])
    assert clock.seconds == 180
    assert clock.pauses == [4810]
    np.testing.assert_allclose(clock(np.array([100, 190, 2000, 5000, 5090])), [0, 90, 90, 90, 180])
    assert ActiveClock([]).seconds == 0


def test_rates_spread_amounts_over_the_time_they_took() -> None:
    # The first amount was begun at an unknown time and does not count.
    middles, values = rates(np.array([0.0, 2.0, 4.0, 8.0]), np.array([99.0, 4.0, 4.0, 4.0]), bins=2)
    assert middles.tolist() == [2, 6]
    assert values.tolist() == [2, 1]
    assert len(rates(np.array([5.0]), np.array([1.0]), bins=2)[0]) == 0


def test_versions_fall_into_their_bands() -> None:
    parts = bands([40, 0, 20, 60, 20], limit=2)
    assert parts == [[0, 20], [40, 60]]
    assert [covering(parts, version) for version in (0, 20, 40, 60)] == [0, 0, 1, 1]
    assert bands([]) == []


def test_picking_keeps_both_ends() -> None:
    lines = [{"n": index} for index in range(10)]
    assert [line["n"] for line in picked(lines, limit=4)] == [0, 3, 6, 9]
    assert picked(lines, limit=10) is lines
