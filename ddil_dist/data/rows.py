"""An endless seeded order of the data's rows, by position, and what the autoencoder makes of each."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ddil_dist.data.cache import LatentCache
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.models.pipeline import TeacherPipeline


class Rows(Protocol):
    """Rows at positions 0, 1, ...: which they are follows from seed and position alone."""

    def posterior(self, first: int, num: int) -> tuple[Tensor, Tensor, list[str]]:
        """Mean and deviation [num, C, h, w] of the rows from `first` on, and their captions."""

    def captions(self, first: int, num: int) -> list[str]:
        """Their captions, without a look at their images."""


class ShuffledRows:
    """Of data that is read at random: epochs, each in an order of its own."""

    def __init__(self, data: ImageTextData, teacher: TeacherPipeline, *, seed: int) -> None:
        self._data = data
        self._teacher = teacher
        self._order = Epochs(len(data), seed)

    def posterior(self, first: int, num: int) -> tuple[Tensor, Tensor, list[str]]:
        images, captions = self._data.images(self._numbers(first, num))
        return *self._teacher.image_posterior(images), captions

    def captions(self, first: int, num: int) -> list[str]:
        return self._data.captions_of(self._numbers(first, num))

    def _numbers(self, first: int, num: int) -> list[int]:
        return [self._order.row(position, self._data.shuffled) for position in range(first, first + num)]


class CachedRows:
    """Of a cache, where every row is as cheap as the next."""

    def __init__(self, cache: LatentCache, *, seed: int) -> None:
        self._cache = cache
        self._order = Epochs(len(cache.captions), seed)

    def posterior(self, first: int, num: int) -> tuple[Tensor, Tensor, list[str]]:
        return self._cache.rows(self._numbers(first, num))

    def captions(self, first: int, num: int) -> list[str]:
        return [self._cache.captions[number] for number in self._numbers(first, num)]

    def _numbers(self, first: int, num: int) -> list[int]:
        return [self._order.row(position, self._permuted) for position in range(first, first + num)]

    def _permuted(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        return generator.permutation(len(self._cache.captions))


class Epochs:
    """Every one of `num` rows once an epoch; remembers the order of the epoch that was asked for last."""

    def __init__(self, num: int, seed: int) -> None:
        self._num = num
        self._seed = seed
        self._epoch = -1
        self._rows: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def row(self, position: int, shuffled: Shuffled) -> int:
        """The row at a position; `shuffled` makes an epoch's order from its generator."""
        epoch, offset = divmod(position, self._num)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, shuffled(np.random.default_rng((self._seed, 2, epoch)))
        return int(self._rows[offset])


class Shuffled(Protocol):
    def __call__(self, generator: np.random.Generator, /) -> npt.NDArray[np.int64]: ...
