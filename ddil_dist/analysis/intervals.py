"""Bootstrap intervals of functions of means (Efron 1979; percentile method)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ddil_dist.analysis.results import Interval

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000
LEVEL = 0.95


def resampled_means(columns: Floats, *, seed: int, num: int = NUM_RESAMPLES) -> Floats:
    """Means of columns [C, N] and of `num` resamples of their N: [1 + num, C], the first row the sample's own.

    All columns are resampled together: what belongs to one row stays together, so paired noise cancels in ratios.
    """
    rng = np.random.default_rng(seed)
    size = columns.shape[1]
    weights = rng.multinomial(size, np.full(size, 1 / size), size=num) / size
    return np.concatenate([columns.mean(axis=1)[None], weights @ columns.T])


def interval(values: Floats) -> Interval:
    """The interval of a function of the means, from its values [1 + num] at the rows of `resampled_means`."""
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values[0]), float(low), float(high))
