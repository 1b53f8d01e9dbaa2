"""How sure a number is: 95% intervals by resampling what it was computed from. Imports no torch.

bootstrap   of functions of means (Efron 1979; percentile method)
jackknife   of statistics of a whole set, such as FID, which resampled sets with repeated rows would bias: a group of
            rows is left out at a time (Shao and Tu 1995, section 2.3)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000
LEVEL = 0.95
NUM_GROUPS = 10
STUDENT_T_9 = 2.2622
"""The 0.975 quantile of Student's t with NUM_GROUPS - 1 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value between the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is surely one."""
        return self.low > 0 or self.high < 0

    def show(self, digits: int = 2) -> str:
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


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


def jackknife(statistic: Callable[[npt.NDArray[Any]], float], size: int, *, seed: int) -> Interval:
    """The interval of a statistic of `size` rows, computed from the row numbers [M] int64 that it is given.

    With NUM_GROUPS groups of rows, drawn by `seed`: the same for another statistic of rows that pair with these.
    """
    assert size >= 2 * NUM_GROUPS, f"{size} rows are too few for {NUM_GROUPS} groups"
    order = np.random.default_rng(seed).permutation(size)
    groups = np.array_split(order, NUM_GROUPS)
    without = np.array([statistic(np.sort(np.setdiff1d(order, group))) for group in groups])
    deviation = float(np.sqrt((NUM_GROUPS - 1) / NUM_GROUPS * ((without - without.mean()) ** 2).sum()))
    value = statistic(np.arange(size))
    return Interval(value, value - STUDENT_T_9 * deviation, value + STUDENT_T_9 * deviation)
