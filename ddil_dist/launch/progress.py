"""What a person sees while a run trains: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ddil_dist.config import RunConfig

LINE_S = 15.0
"""Seconds between lines where there is no terminal."""


@dataclass(frozen=True)
class Progress:
    """A look at a run."""

    phase: str
    update: int = 0
    loss: float | None = None
    replay_size: int = 0
    num_inserted: int = 0
    actors: int = 0
    learner_wait_share: float | None = None
    checkpoint_bytes: int = 0
    """Of the newest checkpoint, written so far."""

    def is_past(self, before: Progress) -> bool:
        """Whether the learner has got on since: by an update, or a piece of a checkpoint."""
        return (self.update, self.checkpoint_bytes) != (before.update, before.checkpoint_bytes)


class ProgressView:
    """Use as a context manager; `show` as often as there is something new."""

    def __init__(self, config: RunConfig, console: Console | None = None) -> None:
        self._config = config
        self._console = console or Console()
        self._last_line = 0.0
        self._last_phase = ""
        self._bars = RichProgress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            expand=True,
        )
        needed = config.replay.min_size
        self._replay = self._bars.add_task("replay", total=needed, note="states before the first update")
        self._updates = self._bars.add_task("updates", total=config.learner.updates, note="starting")
        self._live = Live(self._bars, console=self._console, refresh_per_second=4, transient=False)

    def __enter__(self) -> ProgressView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Bring the view up to date."""
        rollouts = f"{progress.num_inserted:,} states by {progress.actors} actor{'s' * (progress.actors != 1)}"
        training = progress.phase if progress.loss is None else f"loss {progress.loss:.4f}"
        if progress.learner_wait_share is not None:
            training += f", waiting {progress.learner_wait_share:.0%}"
        if self._console.is_terminal:
            filled = min(progress.replay_size, self._config.replay.min_size)
            self._bars.update(self._replay, completed=filled, note=rollouts)
            self._bars.update(self._updates, completed=progress.update, note=training)
            return
        now = time.monotonic()
        if now - self._last_line < LINE_S and progress.phase == self._last_phase:
            return
        self._last_line, self._last_phase = now, progress.phase
        total = self._config.learner.updates
        self._console.print(
            f"{progress.phase}: update {progress.update}/{total}, {training}; replay {progress.replay_size:,} live, "
            f"{rollouts}",
            highlight=False,
            soft_wrap=True,
        )
