"""WebDataset shards: tar files of samples whose members share a name, NAME.jpg and NAME.txt or NAME.json.

The shards are indexed once, from their headers; a row is then read where it lies, in any order, so that a seeded order
can be resumed. That is why they must not be compressed, and why the package `webdataset`, which reads in sequence, is
not needed.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddil_dist.config import DataConfig
from ddil_dist.data.layout import IMAGE_SUFFIXES, Layout, describe
from ddil_dist.data.names import USUAL
from ddil_dist.errors import DataError

CAPTION_SUFFIXES = (".txt", ".text", ".caption", ".json")

TEXT_KEYS = ("caption", *USUAL["text_column"])
"""Of a JSON member, in order after the configured one."""

Place = tuple[int, int, int]
"""Shard, offset and size in bytes."""


@dataclass(slots=True)
class _Row:
    name: str
    image: Place | None = None
    caption: Place | None = None
    is_json: bool = False


class ShardSamples:
    """Rows of tar shards, in the order of the shards' names and of their members."""

    def __init__(self, shards: list[Path], rows: list[_Row], text_key: str) -> None:
        self._shards = shards
        self._rows = rows
        self._text_key = text_key

    @classmethod
    def open(cls, layout: Layout, config: DataConfig) -> ShardSamples:
        """Index the shards; raises DataError for one that is no plain tar file."""
        shards = list(layout.files)
        rows: dict[tuple[int, str], _Row] = {}
        names: list[str] = []
        for number, shard in enumerate(shards):
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in archive:
                        if member.offset_data + member.size > shard.stat().st_size:
                            raise tarfile.ReadError(f"it ends within {member.name}")
                        if member.isreg():
                            names.append(member.name)
                            _note(rows, number, member)
            except (OSError, tarfile.TarError) as error:
                raise DataError(
                    f"data.path: {str(shard)!r} is not a plain tar file ({error}); rows are read where they lie, so "
                    "unpack a compressed shard, or remove a damaged one"
                ) from error
        found = [row for row in rows.values() if row.image]
        if not found:
            inner = any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in names)
            remedy = (
                "unpack the outer tar files, and give the folder of the inner"
                if inner
                else "put images beside captions"
            )
            raise DataError(
                f"data.path: {str(layout.root)!r} has no rows: in its shards are {describe(names)}; {remedy}"
            )
        return cls(shards, found, config.text_column)

    def __len__(self) -> int:
        return len(self._rows)

    def shuffled(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        return generator.permutation(len(self))

    def name(self, row: int) -> str:
        place = self._rows[row].image
        assert place is not None
        return f"{self._rows[row].name} in {self._shards[place[0]]}"

    def image(self, row: int) -> bytes | None:
        place = self._rows[row].image
        return None if place is None else self._read(place)

    def caption(self, row: int) -> str | None:
        place = self._rows[row].caption
        if place is None:
            return None
        try:
            text = self._read(place).decode("utf-8-sig")
            if self._rows[row].is_json:
                fields = json.loads(text)
                found = [fields[key] for key in dict.fromkeys((self._text_key, *TEXT_KEYS)) if key in fields]
                text = next((value for value in found if isinstance(value, str)), "")
        except (ValueError, TypeError):
            return None
        return text.strip() or None

    def _read(self, place: Place) -> bytes:
        shard, offset, size = place
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _note(rows: dict[tuple[int, str], _Row], shard: int, member: tarfile.TarInfo) -> None:
    """Enter a member: the row is its name up to the first dot of its last part, the field what follows."""
    folder, _, file = member.name.rpartition("/")
    name, _, field = file.partition(".")
    suffix = "." + field.lower()
    row = rows.setdefault((shard, f"{folder}/{name}"), _Row(member.name))
    place = (shard, member.offset_data, member.size)
    if suffix in IMAGE_SUFFIXES and row.image is None:
        row.image = place
    elif suffix in CAPTION_SUFFIXES and (row.caption is None or row.is_json):
        row.caption, row.is_json = place, suffix == ".json"
