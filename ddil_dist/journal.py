"""The run's journal: JSON lines that say what happened, for the report and for people.

One writer a file, so that lines never tear each other on shared storage: the learner's rank 0 writes
`metrics.jsonl`, the launcher `events.jsonl`. Every line has "kind" and "time" (unix seconds).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"


class Journal:
    """Appends to one file, a whole line at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._path = path
        if not _ends_a_line(path):
            self._append("\n")  # a writer was killed within a line: keep the next one whole

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line; fields must be JSON (finite numbers). A "time" among them is when it happened."""
        line = json.dumps({"kind": kind, "time": time.time(), **fields}, allow_nan=False)
        self._append(line + "\n")

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)


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
