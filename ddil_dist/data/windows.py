"""Data read in sequence, a window of a few files at a time: what is too large for the disk, or takes long to come.

The files are taken in a seeded order, epoch after epoch, `data.window` of them at a time; the rows of a window are
shuffled among themselves. Every window gives as many rows as the first one of the run's seed has, whatever it holds: a
larger one a random part, a smaller one some rows twice. So the row at a position follows from seed and position alone,
a run is resumed by fetching the window that it is in, and nothing has to be counted first.

What lies elsewhere is fetched into a directory of the reader's own below `data.download`, a window ahead, and removed
after use: a reader holds two windows at a time, and a process the run's first.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tarfile
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from torch import Tensor

from ddil_dist.config import DataConfig
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.data.layout import Layout, find_layout, list_layout, pattern_layout
from ddil_dist.data.places import Remote, fetch, is_pattern, is_remote
from ddil_dist.data.samples import Samples, open_layout
from ddil_dist.errors import DataError
from ddil_dist.models.pipeline import TeacherPipeline
from ddil_dist.sources import resolve_data

KINDS = ("parquet", "webdataset")
TRIES = 3
"""For a file to be fetched; a network that was away for a moment ends no run."""

logger = logging.getLogger(__name__)


class Window:
    """Some of the data's files, opened. directory: holds what was fetched for it, and goes with it, or its process."""

    def __init__(self, data: ImageTextData, directory: Path | None) -> None:
        self.data = data
        self._finalizer = weakref.finalize(self, self.remove, directory)

    @staticmethod
    def remove(directory: Path | None) -> None:
        """Remove what was fetched for a window, if anything was."""
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Remove it now."""
        self._finalizer()


class Windows:
    """The windows of the configured data; seed: the run's, whose first window says how many rows each one gives."""

    def __init__(self, config: DataConfig, *, image_size: int, seed: int) -> None:
        assert config.window is not None
        self._config = config
        self._image_size = image_size
        self._seed = seed
        self._layout, self._remote = list_files(config)
        self._size = min(config.window, len(self._layout.files))
        self._skipped: Counter[str] = Counter()
        self._num_opened = 0
        if config.download is not None and self._remote:
            _remove_left_over(config.download)

    @property
    def per_epoch(self) -> int:
        """Windows that hold every file once."""
        return -(-len(self._layout.files) // self._size)

    @cached_property
    def first(self) -> Window:
        """The first one of the run's seed, kept as long as the process."""
        return self.open(0, seed=self._seed)

    @cached_property
    def num_rows(self) -> int:
        """Rows that every window gives."""
        return len(self.first.data)

    def status(self) -> dict[str, Any]:
        """Rows of the windows that were opened so far, and those found unusable, by what is wrong with them."""
        return {
            "num_rows": self._num_opened,
            "num_skipped": sum(self._skipped.values()),
            "skipped": dict(self._skipped.most_common()),
        }

    def files(self, number: int, *, seed: int) -> list[Path]:
        """The files of a window, counted from 0 over all epochs, as they lie or will lie."""
        epoch, place = divmod(number, self.per_epoch)
        order = np.random.default_rng((seed, 3, epoch)).permutation(len(self._layout.files))
        chosen = order[place * self._size : (place + 1) * self._size]
        return [self._layout.files[index] for index in sorted(chosen)]

    def open(self, number: int, *, seed: int) -> Window:
        """Fetch and index a window; in the place of one whose files are all damaged stands the next.

        Raises DataError, naming the file, where one cannot be had, or no file at all can be read.
        """
        for following in range(number, number + self.per_epoch):
            files, directory = self._fetched(self.files(following, seed=seed))
            samples = self._readable(files, directory or self._layout.root)
            if samples is not None:
                data = ImageTextData(samples, image_size=self._image_size, background=self._config.background)
                self._num_opened += len(data)
                return Window(data, directory)
            Window.remove(directory)
        raise DataError(
            f"data.path: none of the {len(self._layout.files)} files can be read, the first "
            f"{self._layout.files[0].name!r}; make them anew"
        )

    def _fetched(self, files: Sequence[Path]) -> tuple[Sequence[Path], Path | None]:
        """Where the files of a window lie, and the directory that was made for them, if any was."""
        if not self._remote:
            return files, None
        assert self._config.download is not None, "checked as the run was launched"
        directory = self._config.download / _own_name()
        targets = [directory / file.relative_to(self._layout.root) for file in files]
        try:
            _fetch([self._remote[file] for file in files], targets, timeout_s=self._config.fetch_timeout_s)
        except BaseException:
            Window.remove(directory)
            raise
        return targets, directory

    def _readable(self, files: Sequence[Path], root: Path) -> Samples | None:
        """The rows of those shards that are whole; None where none is. Only where one is not is each looked through."""
        layout = Layout(root, self._layout.kind, tuple(files))
        try:
            return open_layout(layout, self._config)
        except DataError:
            whole = tuple(file for file in files if self._is_whole(file))
            if len(whole) == len(files):
                raise
        return open_layout(replace(layout, files=whole), self._config) if whole else None

    def note_skipped(self, window: Window) -> None:
        """Enter what was found unusable in a window that is done with."""
        self._skipped.update(window.data.skipped)

    def _is_whole(self, file: Path) -> bool:
        """Whether a shard is a tar file to its end; one that is not is passed over, told and counted."""
        if self._layout.kind != "webdataset":
            return True
        try:
            with tarfile.open(file, "r:") as archive:
                size = file.stat().st_size
                broken = next((m for m in archive if m.offset_data + m.size > size), None)
            if broken is None:
                return True
            reason = f"it ends within {broken.name}"
        except (OSError, tarfile.TarError) as error:
            reason = str(error)
        self._skipped["a shard that is no whole tar file"] += 1
        logger.warning("data: the shard %s is passed over: %s", file.name, reason)
        return False


class WindowedRows:
    """An endless order of the rows of `windows`; the next window is fetched while this one is read. See `Rows`."""

    def __init__(self, windows: Windows, teacher: TeacherPipeline, *, seed: int) -> None:
        self._windows = windows
        self._teacher = teacher
        self._seed = seed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._number = -1
        self._window: Window | None = None
        self._order: list[int] = []
        self._next: Future[Window] | None = None

    def posterior(self, first: int, num: int) -> tuple[Tensor, Tensor, list[str]]:
        import torch

        images, captions = [], []
        for window, rows in self._parts(first, num):
            some, told = window.data.images(rows)
            images.append(some)
            captions += told
        return *self._teacher.image_posterior(torch.cat(images)), captions

    def captions(self, first: int, num: int) -> list[str]:
        return [caption for window, rows in self._parts(first, num) for caption in window.data.captions_of(rows)]

    def _parts(self, first: int, num: int) -> Iterator[tuple[Window, list[int]]]:
        """The rows at some positions, window by window; each is read before the next is asked for."""
        position = first
        while position < first + num:
            number, offset = divmod(position, self._windows.num_rows)
            count = min(first + num - position, self._windows.num_rows - offset)
            window = self._at(number)
            yield window, self._order[offset : offset + count]
            position += count

    def _ordered(self, number: int, num_rows: int) -> list[int]:
        """The row numbers that a window gives: permutations of its rows, one after the other, up to what it owes."""
        generator = np.random.default_rng((self._seed, 4, number))
        rounds = -(-self._windows.num_rows // num_rows)
        rows = np.concatenate([generator.permutation(num_rows) for _ in range(rounds)])
        return [int(row) for row in rows[: self._windows.num_rows]]

    def _at(self, number: int) -> Window:
        """The window, opened. One that could not be fetched ahead is fetched again when it is needed."""
        if number == self._number and self._window is not None:
            return self._window
        following, self._next = self._next, None
        is_next = following is not None and number == self._number + 1
        if following is not None and not is_next:
            _discard(following)
        fetched = following is not None and is_next and following.exception() is None
        window = following.result() if following is not None and fetched else self._open(number)
        if self._window is not None:
            self._windows.note_skipped(self._window)
            self._window.close()
        self._number, self._window, self._order = number, window, self._ordered(number, len(window.data))
        self._next = self._pool.submit(self._open, number + 1)
        return window

    def _open(self, number: int) -> Window:
        return self._windows.open(number, seed=self._seed)


def _discard(opened: Future[Window]) -> None:
    """Of a window that nobody will read, the files go as soon as they are there."""
    if not opened.cancel():
        opened.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().close())


def list_files(config: DataConfig) -> tuple[Layout, Mapping[Path, Remote]]:
    """The files, fetched or not. Raises DataError where they are not such as hold many rows each."""
    path = resolve_data(config)
    remote: Mapping[Path, Remote] = {}
    if is_remote(path):
        layout, remote = list_layout(path, config)
    elif is_pattern(path):
        layout = pattern_layout(path, config)
    elif Path(path).exists():
        layout = find_layout(Path(path), config)
    else:
        raise DataError(
            f"data.window: {path!r} is a hub id, which is fetched whole; give its address, hf://datasets/{path}, or "
            "set data.window=null"
        )
    if layout.kind not in KINDS:
        raise DataError(
            f"data.window: {path!r} is of the format {layout.kind!r}; a window is of files that hold many rows each, "
            "Parquet or tar shards: set data.window=null, or pack the data into shards"
        )
    return layout, remote


def _fetch(files: Sequence[Remote], targets: Sequence[Path], *, timeout_s: float) -> None:
    """Fetch files; what fails is tried again, TRIES times in all, a little later each time."""
    for attempt in range(TRIES):
        try:
            fetch(files, targets, timeout_s=timeout_s)
            return
        except DataError as error:
            if attempt == TRIES - 1:
                raise
            logger.warning("data: %s; it is tried again", error)
            time.sleep(4.0**attempt)


def _own_name() -> str:
    """A directory's name that says whose it is: a process's that has ended is nobody's."""
    return f"window-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"


def _remove_left_over(download: Path) -> None:
    """Remove windows of processes of this machine that were killed."""
    for path in download.glob(f"window-{socket.gethostname()}-*"):
        with suppress(ValueError, IndexError):
            process = int(path.name.rsplit("-", 2)[1])
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                Window.remove(path)
            except PermissionError:  # it lives, and is another user's
                pass
