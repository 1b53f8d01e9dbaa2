"""Captioned images from Parquet, the layout of Hugging Face image data sets: `image` {bytes, path}, `text`."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from ddil_dist.config import DataConfig
from ddil_dist.errors import DataError
from ddil_dist.sources import resolve_data


class ImageTextData:
    """Captioned images, decoded on demand.

    A row whose image does not decode or whose caption is empty is replaced by the next usable one, and counted in
    `num_skipped`. Random access, so that a seeded order can be resumed.
    """

    def __init__(self, table: pa.Table, config: DataConfig, *, image_size: int) -> None:
        self._images = table.column(config.image_column)
        self._captions = table.column(config.text_column)
        self._size = image_size
        self._broken: set[int] = set()

    @classmethod
    def open(cls, config: DataConfig, *, image_size: int) -> ImageTextData:
        """Open the configured data; raises DataError where nothing in it is usable."""
        path = resolve_data(config)
        wanted = {"data.image_column": config.image_column, "data.text_column": config.text_column}
        try:
            dataset = pq.ParquetDataset(path)
            columns = dataset.schema.names
            missing = {key: column for key, column in wanted.items() if column not in columns}
            table = dataset.read(columns=list({*wanted.values()})) if not missing else None
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"data.path: {str(path)!r} is not readable as Parquet: {error}") from error
        if table is None:
            problems = ", ".join(f"no column {column!r} ({key})" for key, column in missing.items())
            raise DataError(f"data.path: {str(path)!r} has {problems}; its columns are {columns}")
        data = cls(table, config, image_size=image_size)
        if len(data) == 0:
            raise DataError(f"data.path: {str(path)!r} has no rows")
        data.images([0])
        return data

    def __len__(self) -> int:
        return len(self._captions)

    @property
    def num_skipped(self) -> int:
        """Rows found unusable so far."""
        return len(self._broken)

    def captions(self) -> list[str]:
        """Every caption that is not empty, in order."""
        return [text for text in self._captions.to_pylist() if isinstance(text, str) and text.strip()]

    def images(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Images [B, 3, H, W] float32 in [-1, 1], resized and centre-cropped, and their captions."""
        rows = [self._usable(index) for index in indices]
        return torch.stack([image for image, _ in rows]), [caption for _, caption in rows]

    def _usable(self, index: int) -> tuple[Tensor, str]:
        for offset in range(len(self)):
            row = (index + offset) % len(self)
            if row in self._broken:
                continue
            decoded = self._decode(row)
            if decoded is not None:
                return decoded
            self._broken.add(row)
        raise DataError(f"none of the {len(self)} rows has an image that decodes and a caption")

    def _decode(self, row: int) -> tuple[Tensor, str] | None:
        caption = self._captions[row].as_py()
        cell = self._images[row].as_py()
        encoded = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(encoded, bytes) or not isinstance(caption, str) or not caption.strip():
            return None
        try:
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # PNG's are SyntaxErrors
            return None
        return _to_tensor(image, self._size), caption


def _to_tensor(image: Image.Image, size: int) -> Tensor:
    scale = size / min(image.size)
    if image.size != (size, size):
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)
