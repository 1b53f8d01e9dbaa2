"""The run's journal: JSON lines that say what happened, for the report and for people.

One writer a file, so that lines never tear each other on shared storage: the learner's rank 0 writes
`metrics.jsonl`, the launcher `events.jsonl`. Every line has "kind" and "time" (unix seconds).

A line that cannot be written, on a full disk mostly, is left out with a warning: no run ends for want of a record.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"

logger = logging.getLogger(__name__)


class Journal:
    """Appends to one file, a whole line at a time. Threads may share one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._path = path
        self._lock = threading.Lock()
        self._torn = not _ends_a_line(path)  # a writer was killed within a line
        self._num_lost = 0

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line; fields must be JSON (finite numbers). A "time" among them is when it happened."""
        line = json.dumps({"kind": kind, "time": time.time(), **fields}, allow_nan=False)
        with self._lock:
            try:
                self._append(line)
            except OSError as error:
                self._torn = True  # perhaps: part of it may be there
                if not self._num_lost:
                    logger.warning("%s cannot be written (%s); the run goes on without these lines", self._path, error)
                self._num_lost += 1
                return
            if self._num_lost:
                logger.warning("%s is written again; %d lines are missing", self._path, self._num_lost)
                self._num_lost = 0

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n" if self._torn else f"{line}\n")  # a torn line must not spoil this one
        self._torn = False


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal, in order; [] if there is none. Lines that a kill tore are left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries
