"""What runs are at, for any number of browsers: each run is looked at once in a while, whoever asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_dist.config import RedisConfig
from ddil_dist.errors import DdilError
from ddil_dist.monitor.report import compare
from ddil_dist.monitor.snapshot import Snapshot, Source
from ddil_dist.report.page import render_sections
from ddil_dist.report.record import read_run
from ddil_dist.runs import CONFIG_FILE, stage_of

WINDOW_S = 20.0
"""Rates are over about this long."""
REPORT_S = 15.0
"""The report of a run that goes on is drawn anew at most so often: it takes a second or two."""
DRAWING = threading.Lock()
"""One report is drawn at a time."""


@dataclass(frozen=True)
class Now:
    """What a run is at: the monitor's report of it, or why there is none; since: of that reason, unix seconds."""

    report: dict[str, Any] | None
    reason: str | None = None
    since: float | None = None


class RunWatch:
    """Looks at one run. Threads may share it."""

    def __init__(self, path: Path, find_redis: Callable[[Path], RedisConfig], *, interval_s: float) -> None:
        self.path = path
        self._find_redis = find_redis
        self._interval_s = interval_s
        self._looking = threading.Lock()
        self._source: Source | None = None
        self._history: list[Snapshot] = []
        self._now: Now | None = None
        self._looked = self._drawn = -float("inf")
        self._seen: object = None
        self._sections = ""
        self.version = 0
        """Of the report; goes up when it was drawn anew."""

    def now(self) -> Now:
        """The run now, or at the last look where that was a moment ago."""
        with self._looking:
            if self._now is None or time.monotonic() - self._looked >= self._interval_s:
                self._now = self._look()
                self._looked = time.monotonic()
            return self._now

    def sections(self) -> str:
        """The report's markup, of files as they are, or were REPORT_S ago at most."""
        with DRAWING:
            if time.monotonic() - self._drawn >= REPORT_S and (seen := _stamps(self._stage)) != self._seen:
                self._sections = render_sections(read_run(self._stage))
                self._seen, self._drawn = seen, time.monotonic()
                self.version += 1
            return self._sections

    @property
    def _stage(self) -> Path:
        return stage_of(self.path)

    def _look(self) -> Now:
        stage = self._stage
        if self._source is None or self._source.path != stage:
            self.close()
            self._source = Source(stage, lambda: self._find_redis(stage))
        try:
            self._history.append(self._source.take())
        except DdilError as error:
            self.close()
            since = self._now.since if self._now is not None and self._now.since is not None else time.time()
            return Now(None, str(error), since)
        while len(self._history) > 2 and self._history[1].time < self._history[-1].time - WINDOW_S:
            self._history.pop(0)
        return Now(compare(self._history[0], self._history[-1], stage.name))

    def close(self) -> None:
        """Close its connections; a later look opens them again."""
        self._history.clear()
        if self._source is not None:
            self._source.close()
        self._source = None


class Runs:
    """The runs below a directory, by name."""

    def __init__(self, directory: Path, find_redis: Callable[[Path], RedisConfig], *, interval_s: float = 2.0) -> None:
        self.directory = directory
        self.interval_s = interval_s
        self._find_redis = find_redis
        self._watches: dict[str, RunWatch] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of all runs that there are, the newest first."""
        found = [path.parent for path in self.directory.glob(f"*/{CONFIG_FILE}")]
        return [path.name for path in sorted(found, key=lambda path: -(path / CONFIG_FILE).stat().st_mtime)]

    def get(self, name: str) -> RunWatch | None:
        """The run of this very name; None where there is none."""
        if name not in self.names():
            return None
        with self._lock:
            if name not in self._watches:
                self._watches[name] = RunWatch(self.directory / name, self._find_redis, interval_s=self.interval_s)
            return self._watches[name]

    def close(self) -> None:
        for watch in self._watches.values():
            watch.close()


def _stamps(path: Path) -> object:
    """What changes when a run's files do."""
    files = [*path.glob("*.jsonl"), *path.glob("*.json"), *path.glob("samples/*.json"), *path.glob("progress/*.png")]
    return sorted((str(file), file.stat().st_mtime_ns) for file in files if file.is_file())
