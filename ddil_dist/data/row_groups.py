"""A column of Parquet files, read a row group at a time: a data set may be larger than memory.

Parquet gives a row only with the whole group that it is in. So the groups used last are kept, and rows are shuffled
among a few groups at a time: an epoch then reads each group about once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from threading import Lock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from ddil_dist.errors import DataError

CACHE_BYTES = 2**30
"""What a process keeps of the column, at most, or STREAMS groups if they are larger; a column that fits is read once.

The order of the rows follows from it: a run that is resumed under another goes on in another order.
"""
STREAMS = 2
"""Orders that are read at a time, each of which needs a group at least: a learner may draw states from one, its
discriminator's data from another."""


class RowGroups:
    """Cells by row number, over all files. Threads may share it.

    Invariant: kept are the groups used last, and no more of them than fit into CACHE_BYTES, or STREAMS.
    """

    def __init__(self, fragments: Sequence[ds.ParquetFileFragment], schema: pa.Schema, column: str) -> None:
        self._groups = [group for fragment in fragments for group in fragment.split_by_row_group()]
        self._schema = schema
        self._column = column
        self._first = np.cumsum([0, *(group.row_groups[0].num_rows for group in self._groups)])
        self._size_bytes = [_size_bytes(group, column) for group in self._groups]
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._kept_bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self._first[-1])

    def path(self, row: int) -> str:
        """The file that a row lies in."""
        return str(self._groups[self._group_of(row)].path)

    def __getitem__(self, row: int) -> pa.Scalar:
        group = self._group_of(row)
        return self._cells(group)[row - int(self._first[group])]

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._first, row, side="right")) - 1

    def shuffled(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Every row once: groups in any order, and rows in any order among the groups that are kept at a time."""
        sizes = [size * self._expansion for size in self._size_bytes]
        if sum(sizes) <= 0.99 * CACHE_BYTES:
            return generator.permutation(len(self))
        groups = generator.permutation(len(self._groups))
        num_rows = np.diff(self._first)[groups]
        ends = np.cumsum(num_rows)
        rows = np.repeat(self._first[groups] - (ends - num_rows), num_rows) + np.arange(len(self))
        begin, held = 0, 0.0
        for group, first in zip(groups, ends - num_rows, strict=True):
            if held and held + sizes[group] > CACHE_BYTES / STREAMS:
                generator.shuffle(rows[begin:first])
                begin, held = first, 0.0
            held += sizes[group]
        generator.shuffle(rows[begin:])
        return rows

    @cached_property
    def _expansion(self) -> float:
        """How much larger cells are in memory than the file says, which has an image that repeats but once: as much as
        in the largest group."""
        largest = int(np.argmax(self._size_bytes))
        in_memory = int(self._cells(largest).get_total_buffer_size())
        return max(1.0, in_memory / max(1, self._size_bytes[largest]))

    def _cells(self, group: int) -> pa.ChunkedArray:
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
            while len(self._kept) >= STREAMS and self._kept_bytes + self._size_bytes[group] > CACHE_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1].get_total_buffer_size()
            cells = self._kept[group] = self._read(group)
            self._kept_bytes += cells.get_total_buffer_size()
            return cells

    def _read(self, group: int) -> pa.ChunkedArray:
        """Raises DataError where what is there is damaged, and OSError where it cannot be reached: storage may be back
        by the time that a worker that died of it is restarted."""
        part = self._groups[group]
        where = f"data.path: row group {part.row_groups[0].id} of {part.path}"
        try:
            return part.to_table(schema=self._schema, columns=[self._column]).column(0)
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(error.errno, f"{where} cannot be reached: {error}") from error
            reason = " ".join(str(error).split())
            raise DataError(f"{where} is damaged: {reason}; fetch the file again, or take it away") from error


def _size_bytes(group: ds.ParquetFileFragment, column: str) -> int:
    """What the column of a row group takes in memory, as the file says."""
    parts = group.row_groups[0].metadata
    chunks = (parts.column(number) for number in range(parts.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
