"""Small Parquet files of images and captions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ddil_dist.config import DataConfig


def encoded(color: tuple[int, int, int], size: tuple[int, int] = (16, 16), *, kind: str = "PNG") -> bytes:
    """A plain image, encoded."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format=kind)
    return buffer.getvalue()


def write_rows(path: Path, rows: list[tuple[Any, Any]], *, group: int | None = None) -> DataConfig:
    """Write (image bytes, caption) rows in the layout of Hugging Face image data sets, `group` rows a row group."""
    images = pa.array(
        [{"bytes": image, "path": None} for image, _ in rows],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    captions = pa.array([caption for _, caption in rows])
    pq.write_table(pa.table({"image": images, "text": captions}), path, row_group_size=group)
    return DataConfig(path=str(path))
