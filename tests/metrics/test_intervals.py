"""Bootstrap intervals against the normal approximation, and pairing."""

from __future__ import annotations

import numpy as np
import pytest

from ddil_dist.metrics.intervals import Interval, interval, jackknife, resampled_means


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    rows = np.random.default_rng(0).exponential(size=400)
    found = interval(resampled_means(rows[None], seed=1)[:, 0])
    error = rows.std() / len(rows) ** 0.5
    assert found.value == rows.mean()
    assert found.low == pytest.approx(rows.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(rows.mean() + 1.96 * error, abs=0.25 * error)
    assert found.half_width == pytest.approx((found.high - found.low) / 2)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        found = interval(resampled_means(rng.normal(3, 1, size=(1, 60)), seed=trial, num=400)[:, 0])
        covered += found.low <= 3 <= found.high
    assert 0.88 * 200 <= covered <= 0.99 * 200


def test_what_pairs_share_cancels_in_a_ratio() -> None:
    shared = np.random.default_rng(3).exponential(size=300)
    means = resampled_means(np.stack([1.5 * shared, shared]), seed=4)
    found = interval(means[:, 0] / means[:, 1])
    assert (found.low, found.high) == pytest.approx((1.5, 1.5))


def test_the_jackknife_of_a_mean_is_that_of_its_standard_error() -> None:
    rows = np.random.default_rng(5).normal(2, 3, size=5000)
    found = jackknife(lambda index: float(rows[index].mean()), len(rows), seed=0)
    assert found.value == rows.mean()
    wanted = 2.2622 * 3 / len(rows) ** 0.5
    assert 0.4 * wanted < found.half_width < 1.8 * wanted, "of nine degrees of freedom"
    assert found.half_width == pytest.approx(found.high - found.value)


def test_the_jackknife_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for trial in range(200):
        rows = rng.normal(0, 2, size=100)
        found = jackknife(lambda index, rows=rows: float(rows[index].var()), 100, seed=trial)  # type: ignore[misc]
        covered += found.low <= 4 <= found.high
    assert 0.88 * 200 <= covered <= 0.995 * 200


def test_a_difference_is_sure_where_its_interval_holds_no_zero() -> None:
    assert Interval(1, 0.1, 2).excludes_zero
    assert Interval(-1, -2, -0.1).excludes_zero
    assert not Interval(1, -0.1, 2).excludes_zero
