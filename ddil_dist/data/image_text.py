"""Captioned images, decoded, and an account of the rows that cannot be used."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddil_dist.config import DataConfig
from ddil_dist.data.decoding import UnknownRangeError, decode_image
from ddil_dist.data.layout import is_pointer
from ddil_dist.data.samples import Samples, open_samples
from ddil_dist.data.skipped import by_reason
from ddil_dist.errors import DataError

NO_CAPTION = "no caption"
NO_IMAGE = "no image"
POINTER = "a git-lfs pointer instead of an image"
UNKNOWN_RANGE = "pixels of 32 bits, whose range is unknown"
UNDECODED = "an image that does not decode"

logger = logging.getLogger(__name__)


class ImageTextData:
    """Captioned images, decoded on demand.

    A row whose image does not decode or whose caption is empty is replaced by the next usable one, counted in
    `skipped`, and told in the log. Random access, so that a seeded order can be resumed. Threads may share it.
    """

    def __init__(self, samples: Samples, *, image_size: int, background: str) -> None:
        self._samples = samples
        self._size = image_size
        self._background = background
        self._broken: dict[int, str] = {}

    @classmethod
    def open(cls, config: DataConfig, *, image_size: int) -> ImageTextData:
        """Open the configured data; raises DataError where nothing in it is usable."""
        data = cls(open_samples(config), image_size=image_size, background=config.background)
        data.images([0])
        return data

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def num_skipped(self) -> int:
        """Rows found unusable so far."""
        return len(self._broken)

    @property
    def skipped(self) -> dict[str, int]:
        """The number of them by what is wrong, the most frequent first."""
        return dict(Counter(list(self._broken.values())).most_common())

    def name(self, row: int) -> str:
        """Where a row lies, for people."""
        return self._samples.name(row)

    def captions(self) -> list[str]:
        """Every caption that is not empty, in order."""
        captions = (self._samples.caption(row) for row in range(len(self)))
        return [caption for caption in captions if caption is not None]

    def captions_of(self, indices: Sequence[int]) -> list[str]:
        """Of each row its caption, or the next one that is not empty; images are not looked at."""
        return [self._caption(index) for index in indices]

    def _caption(self, index: int) -> str:
        for offset in range(len(self)):
            caption = self._samples.caption((index + offset) % len(self))
            if caption is not None:
                return caption
        raise DataError(f"none of the {len(self)} rows has a caption")

    def shuffled(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Every row's number once, [N], in an order that the generator decides and in which rows are cheap to read."""
        return self._samples.shuffled(generator)

    def images(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Images [B, 3, H, W] float32 in [-1, 1], resized and centre-cropped, and their captions."""
        rows = [self._usable(index) for index in indices]
        return torch.stack([image for image, _ in rows]), [caption for _, caption in rows]

    def row(self, index: int) -> tuple[Tensor, str] | None:
        """A row's image [3, H, W] and its caption; None, counted, if either is not usable."""
        if index in self._broken:
            return None
        found = self._decode(index)
        if not isinstance(found, str):
            return found
        self._broken[index] = found
        if _is_round(self.num_skipped):
            logger.warning(
                "data: %d of %d rows skipped so far, %s the last: %s",
                *(self.num_skipped, len(self), self._samples.name(index), found),
            )
        return None

    def _usable(self, index: int) -> tuple[Tensor, str]:
        for offset in range(len(self)):
            found = self.row((index + offset) % len(self))
            if found is not None:
                return found
        raise DataError(
            f"data.path: none of the {len(self)} rows has an image that decodes and a caption: "
            f"{by_reason(self.skipped)}; the first, {self._samples.name(0)}, has {self._broken[0]}"
        )

    def _decode(self, row: int) -> tuple[Tensor, str] | str:
        """A row's image and caption, or what is wrong with it."""
        caption, encoded = self._samples.caption(row), self._samples.image(row)
        if caption is None:
            return NO_CAPTION
        if encoded is None:
            return NO_IMAGE
        try:
            return decode_image(encoded, size=self._size, background=self._background), caption
        except UnknownRangeError:
            return UNKNOWN_RANGE
        except Exception:  # decoders raise anything at damaged bytes: struct.error, IndexError, ZeroDivisionError
            return POINTER if is_pointer(encoded) else UNDECODED


def _is_round(number: int) -> bool:
    """1, 10, 100 and so on: a log of a set with many broken rows stays short."""
    return str(number).strip("0") == "1"
