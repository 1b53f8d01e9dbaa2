"""Captioned images as they lie on disk, whatever the format: numbered rows of an encoded image and a caption.

parquet      image and text columns, a file or a directory of them
arrow        a data set that `datasets` saved to disk
webdataset   tar shards, or a directory of them: NAME.jpg and NAME.txt or NAME.json side by side
folder       images with captions: NAME.txt beside NAME.png, or metadata.jsonl or .csv with file_name and text
a hub id     owner/name: the data set's Parquet files on the Hugging Face hub

Of a directory `layout` says which files are meant.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ddil_dist.config import DataConfig
from ddil_dist.data.columns import open_arrow, open_parquet
from ddil_dist.data.folder import FolderSamples
from ddil_dist.data.hub import fetch_from_hub
from ddil_dist.data.layout import Layout, fetch_layout, find_layout, pattern_layout
from ddil_dist.data.places import is_pattern, is_remote
from ddil_dist.data.shards import ShardSamples
from ddil_dist.errors import DataError
from ddil_dist.sources import resolve_data


class Samples(Protocol):
    """Rows by number; what is not usable is None, and not an error."""

    def __len__(self) -> int: ...

    def image(self, row: int) -> bytes | None:
        """A row's encoded image."""

    def caption(self, row: int) -> str | None:
        """A row's caption, not blank."""

    def name(self, row: int) -> str:
        """Where a row lies, for people."""

    def shuffled(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Every row once, [N], in an order that the generator decides and in which rows are cheap to read."""


FORMATS: dict[str, Callable[[Layout, DataConfig], Samples]] = {
    "parquet": open_parquet,
    "arrow": open_arrow,
    "webdataset": ShardSamples.open,
    "folder": FolderSamples.open,
}


def open_samples(config: DataConfig) -> Samples:
    """The configured data; raises DataError where there is none, or none of the format."""
    return open_layout(_layout(resolve_data(config), config), config)


def open_layout(layout: Layout, config: DataConfig) -> Samples:
    """The rows of some files; raises DataError where there are none."""
    samples = FORMATS[layout.kind](layout, config)
    if len(samples) == 0:
        raise DataError(f"data.path: {str(layout.root)!r} has no rows")
    return samples


def _layout(path: str, config: DataConfig) -> Layout:
    if is_remote(path):
        return fetch_layout(path, config)
    if is_pattern(path):
        return pattern_layout(path, config)
    return find_layout(Path(path), config) if Path(path).exists() else fetch_from_hub(config)
