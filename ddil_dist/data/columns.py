"""Captioned images in columns: Parquet, Arrow files that `datasets` saved, and Parquet on the Hugging Face hub.

The layout is that of Hugging Face image data sets: `image` {bytes, path} or bare bytes, and `text`, one caption or a
list of them, of which the first that is not blank is taken.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ddil_dist.config import DataConfig
from ddil_dist.data.layout import Layout
from ddil_dist.data.names import choose_columns
from ddil_dist.data.row_groups import RowGroups
from ddil_dist.errors import DataError


class ColumnSamples:
    """Rows of two columns: the images may lie in files still."""

    def __init__(self, images: pa.ChunkedArray | RowGroups, captions: pa.ChunkedArray) -> None:
        assert len(images) == len(captions), f"{len(images)} images, {len(captions)} captions"
        self._images = images
        self._captions = captions

    def __len__(self) -> int:
        return len(self._captions)

    def shuffled(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        if isinstance(self._images, RowGroups):
            return self._images.shuffled(generator)
        return generator.permutation(len(self))

    def name(self, row: int) -> str:
        return f"row {row} of {self._images.path(row)}" if isinstance(self._images, RowGroups) else f"row {row}"

    def image(self, row: int) -> bytes | None:
        cell = self._images[row].as_py()
        if isinstance(cell, dict):
            encoded, path = cell.get("bytes"), cell.get("path")
            if encoded is None and isinstance(path, str) and Path(path).is_file():
                return Path(path).read_bytes()
            cell = encoded
        return cell if isinstance(cell, bytes) else None

    def caption(self, row: int) -> str | None:
        cell = self._captions[row].as_py()
        captions = cell if isinstance(cell, list) else [cell]
        return next((text for text in captions if isinstance(text, str) and text.strip()), None)


def open_parquet(layout: Layout, config: DataConfig) -> ColumnSamples:
    """Parquet files; their images stay there."""
    try:
        dataset = pq.ParquetDataset([str(file) for file in layout.files])
        image_column, text_column = choose_columns(str(layout.root), dataset.schema.names, config)
        captions = dataset.read(columns=[text_column]).column(0)
        return ColumnSamples(RowGroups(dataset.fragments, dataset.schema, image_column), captions)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.path: {str(layout.root)!r} is not readable as Parquet: {error}") from error


def open_arrow(layout: Layout, config: DataConfig) -> ColumnSamples:
    """What `Dataset.save_to_disk` wrote, or the `data.split` of what `DatasetDict.save_to_disk` wrote."""
    path = layout.root
    folders = {file.parent for file in layout.files}
    home = next((folder for folder in (path / config.split, path, path.parent) if folder in folders), None)
    if home is None:
        raise DataError(
            f"data.split: {str(path)!r} has no Arrow files of a split {config.split!r}; it has "
            f"{sorted(folder.name for folder in folders)}"
        )
    try:
        tables = []
        for file in (file for file in layout.files if file.parent == home):
            with pa.memory_map(str(file)) as source:
                tables.append(pa.ipc.open_stream(source).read_all())
        table = pa.concat_tables(tables)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.path: {str(home)!r} is not readable as Arrow: {error}") from error
    image_column, text_column = choose_columns(str(path), table.column_names, config)
    return ColumnSamples(table.column(image_column), table.column(text_column))
