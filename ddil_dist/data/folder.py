"""Captioned images in a folder: NAME.txt beside NAME.png, or one metadata file with a line an image."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddil_dist.config import DataConfig
from ddil_dist.data.layout import METADATA, Layout
from ddil_dist.data.names import choose
from ddil_dist.errors import DataError


class FolderSamples:
    """Images below a folder in the order of their names; captions are read when they are asked for.

    captions: by the image's path where a metadata file gives them; None where text files beside the images do.
    """

    def __init__(self, images: list[Path], captions: dict[Path, str] | None) -> None:
        self._images = images
        self._captions = captions

    @classmethod
    def open(cls, layout: Layout, config: DataConfig) -> FolderSamples:
        """Raises DataError for a metadata file that cannot be read, or that lacks its columns."""
        folders = {folder for file in layout.files for folder in file.relative_to(layout.root).parents}
        places = [layout.root / folder / name for name in METADATA for folder in sorted(folders)]
        metadata = [file for file in places if file.is_file()]
        if metadata:
            captions = {place: text for file in metadata for place, text in _captions(file, config)}
            return cls(list(captions), captions)
        return cls(list(layout.files), None)

    def __len__(self) -> int:
        return len(self._images)

    def shuffled(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        return generator.permutation(len(self))

    def name(self, row: int) -> str:
        return str(self._images[row])

    def image(self, row: int) -> bytes | None:
        try:
            return self._images[row].read_bytes()
        except OSError:
            return None

    def caption(self, row: int) -> str | None:
        image = self._images[row]
        try:
            text = image.with_suffix(".txt").read_text("utf-8-sig") if self._captions is None else self._captions[image]
        except (OSError, UnicodeDecodeError):
            return None
        return text.strip() or None


def _captions(file: Path, config: DataConfig) -> Iterator[tuple[Path, str]]:
    """Image and caption of every line of a metadata file."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            lines: Any = csv.DictReader(handle) if file.suffix == ".csv" else map(json.loads, filter(str.strip, handle))
            for number, line in enumerate(lines, start=1):
                column = choose("text_column", line, config)
                if column is None or "file_name" not in line:
                    missing = [*({"file_name"} - set(line)), *([config.text_column] if column is None else [])]
                    raise DataError(
                        f"data.path: line {number} of {file} has no {' and no '.join(map(repr, missing))} "
                        f"(file_name and data.text_column); it has {sorted(map(str, line))}"
                    )
                text = line[column]
                yield file.parent / str(line["file_name"]), text if isinstance(text, str) else ""
    except (OSError, ValueError, TypeError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data.path: {file} cannot be read: {error}") from error
