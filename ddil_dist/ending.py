"""The last part of a run whose student is there: evaluated, watched and stopped from outside, and reported.

`launch` comes here once the training is finished, `python -m ddil_dist.evaluate` whenever it is called.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ddil_dist.config import RunConfig
from ddil_dist.errors import DdilError, EvaluationStoppedError
from ddil_dist.evaluation.tally import Made
from ddil_dist.journal import EVENTS_FILE, Journal
from ddil_dist.report import write_report
from ddil_dist.runs import FINISHED_FILE
from ddil_dist.signals import stop_on_signals
from ddil_dist.status import Status, StatusFile, is_asked_to_stop

if TYPE_CHECKING:
    from rich.console import Console

    from ddil_dist.metrics.results import Results

EXIT_INTERRUPTED = 130
"""Of a launch that was stopped before its training was finished, as shells have it for Ctrl-C."""
EXIT_UNMEASURED = 3
"""Of a command whose evaluation was stopped: student and report are there, some figures are not."""

MAX_REASON_CHARS = 2_000

logger = logging.getLogger(__name__)


def end_run(config: RunConfig, evaluate: Callable[..., Results], *, console: Console, closes: bool = True) -> None:
    """Evaluate the run's student, write the report, tell both, and mark the run as finished where that `closes` it.

    evaluate: `ddil_dist.evaluate.evaluate_run`. One that fails or is stopped costs neither student nor report: they
    are written and told before DdilError or EvaluationStoppedError says what is missing. Needs the run's lock
    (`status.own_run`) and the main thread.
    """
    path, status = config.run.path, StatusFile(config.run.path)
    outcome = _evaluate(config, evaluate, console, status, closes=closes) if config.evaluation.num_images else None
    if outcome is None or not closes:
        status.clear()
    else:
        status.show(outcome)
    report = write_report(path)
    if outcome is None and closes:
        (path / FINISHED_FILE).write_text(str(config.learner.updates), encoding="utf-8")
    console.print(f"student  {path / 'student'}", highlight=False, soft_wrap=True)
    console.print(f"report   {report}", highlight=False, soft_wrap=True)
    if outcome is not None:
        kind = EvaluationStoppedError if outcome.phase == "stopped" else DdilError
        begun = "the training is finished, and its student exported, but " if closes else ""
        raise kind(f"{begun}{outcome}; evaluate it again with: python -m ddil_dist.evaluate {path}")


def _evaluate(
    config: RunConfig, evaluate: Callable[..., Results], console: Console, status: StatusFile, *, closes: bool
) -> Status | None:
    """Measure, and print the table; how it failed or was stopped, None where it was whole."""
    from ddil_dist.metrics.table import results_table

    begun = time.monotonic()
    status.show(Status("evaluation", closes=closes))
    try:
        with stop_on_signals("stopping the evaluation") as stop:
            results = evaluate(config, console=console, on_batch=_watcher(config, status, stop, closes=closes))
    except Exception as error:  # told to the user, whatever it is
        logger.debug("evaluation", exc_info=True)
        return Status("failed", reason=(str(error) or repr(error))[:MAX_REASON_CHARS])
    finally:
        Journal(config.run.path / EVENTS_FILE).write("phase", name="evaluation", seconds=time.monotonic() - begun)
    if results.policies:
        console.print(results_table(results.policies))
    return Status("stopped", unmeasured=tuple(results.unmeasured)) if results.unmeasured else None


def _watcher(config: RunConfig, status: StatusFile, stop: threading.Event, *, closes: bool) -> Callable[[Made], None]:
    """What is called before every batch: it writes the status, and ends the evaluation where somebody wants that."""
    begun = time.monotonic()

    def on_batch(made: Made) -> None:
        if stop.is_set() or is_asked_to_stop(config.run.path):
            raise EvaluationStoppedError("the evaluation was stopped")
        left = (time.monotonic() - begun) * (1 - made.share) / made.share if made.share > 0 else None
        status.show(
            Status(
                "evaluation",
                policy=made.policy,
                done=made.num_images,
                total=made.total_images,
                left_s=left,
                closes=closes,
            )
        )

    return on_batch
