"""Captioned images, decoded: their middle square resized, scaled to [-1, 1]."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ddil_dist.config import DataConfig
from ddil_dist.data.samples import Samples, open_samples
from ddil_dist.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What images may be in; the decoder's others include such that run a program, as EPS does."""

logger = logging.getLogger(__name__)


class ImageTextData:
    """Captioned images, decoded on demand.

    A row whose image does not decode or whose caption is empty is replaced by the next usable one, counted in
    `num_skipped`, and told in the log. Random access, so that a seeded order can be resumed. Threads may share it.
    """

    def __init__(self, samples: Samples, *, image_size: int) -> None:
        self._samples = samples
        self._size = image_size
        self._broken: set[int] = set()

    @classmethod
    def open(cls, config: DataConfig, *, image_size: int) -> ImageTextData:
        """Open the configured data; raises DataError where nothing in it is usable."""
        data = cls(open_samples(config), image_size=image_size)
        data.images([0])
        return data

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def num_skipped(self) -> int:
        """Rows found unusable so far."""
        return len(self._broken)

    def captions(self) -> list[str]:
        """Every caption that is not empty, in order."""
        captions = (self._samples.caption(row) for row in range(len(self)))
        return [caption for caption in captions if caption is not None]

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
        decoded = self._decode(index)
        if decoded is None:
            self._broken.add(index)
            if _is_round(self.num_skipped):
                logger.warning(
                    "data: %d of %d rows skipped so far, row %d the last: no image that decodes, or no caption",
                    *(self.num_skipped, len(self), index),
                )
        return decoded

    def _usable(self, index: int) -> tuple[Tensor, str]:
        for offset in range(len(self)):
            found = self.row((index + offset) % len(self))
            if found is not None:
                return found
        raise DataError(f"none of the {len(self)} rows has an image that decodes and a caption")

    def _decode(self, row: int) -> tuple[Tensor, str] | None:
        caption, encoded = self._samples.caption(row), self._samples.image(row)
        if caption is None or encoded is None:
            return None
        try:
            image = Image.open(io.BytesIO(encoded), formats=FORMATS).convert("RGB")
            return _to_tensor(image, self._size), caption
        except Exception:  # decoders raise anything at damaged bytes: struct.error, IndexError, ZeroDivisionError
            return None


def _is_round(number: int) -> bool:
    """1, 10, 100 and so on: a log of a set with many broken rows stays short."""
    return str(number).strip("0") == "1"


def _to_tensor(image: Image.Image, size: int) -> Tensor:
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # The square alone: all of a long strip, enlarged by its short side, may be of gigabytes.
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)
