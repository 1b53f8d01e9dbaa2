"""The end of a run: the student as a stock pipeline, the table, the report."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from ddil_dist.best import KEPT_DIRECTORY, Best, Measure, read_best, write_best
from ddil_dist.card import write_card
from ddil_dist.config import RunConfig
from ddil_dist.config.curriculum import BEST_DIRECTORY, STUDENT_DIRECTORY
from ddil_dist.ending import end_run
from ddil_dist.errors import CheckpointError, DataError
from ddil_dist.evaluation import runs
from ddil_dist.export import adapter_path, export_student, verify_export
from ddil_dist.journal import EVENTS_FILE, Journal
from ddil_dist.metrics.results import RESULTS_FILE
from ddil_dist.models.export import replace_directory
from ddil_dist.problem import ImitationProblem, default_device
from ddil_dist.report import REPORT_FILE
from ddil_dist.runs import FINISHED_FILE
from ddil_dist.status import Status, StatusFile
from learner.assemble import checkpoints_of
from learner.checkpoint import averaged_weights
from learner.keeper import find_kept

logger = logging.getLogger(__name__)

UNVERIFIED_SUFFIX = ".unverified"
"""Of an export until it is known to be the student."""


def finish_run(config: RunConfig) -> None:
    """Export, evaluate and report a trained run, and print what came out.

    Raises what `end_run` does where the evaluation fails or is stopped; student and report are there then, too.
    """
    reopen_run(config)
    for stale in (REPORT_FILE, RESULTS_FILE):  # an earlier end's
        (config.run.path / stale).unlink(missing_ok=True)
    StatusFile(config.run.path).show(Status("export"))
    begun = time.monotonic()
    export_run(config)
    best = export_best(config)
    Journal(config.run.path / EVENTS_FILE).write("phase", name="export", seconds=time.monotonic() - begun)
    console = Console()
    if best is not None:
        path = config.run.path / BEST_DIRECTORY
        console.print(f"best     {path} ({best.sentence()})", highlight=False, soft_wrap=True)
    end_run(config, runs.evaluate_run, console=console)


def reopen_run(config: RunConfig) -> None:
    """Take away the marks that an earlier end left."""
    (config.run.path / FINISHED_FILE).unlink(missing_ok=True)
    StatusFile(config.run.path).clear()


def is_trained(config: RunConfig) -> bool:
    """Whether the run has a checkpoint of its last update, so that only its end is left to do."""
    checkpoints, last = checkpoints_of(config), config.learner.updates
    return checkpoints.newest_update() == last and checkpoints.is_whole(last)


def is_finished(config: RunConfig) -> bool:
    """Whether the run is trained, and its student is there, verified, evaluated and reported."""
    mark = config.run.path / FINISHED_FILE
    ended = mark.read_text(encoding="utf-8") if mark.is_file() else ""  # an extended run's, after fewer updates
    return (
        ended == str(config.learner.updates) and is_trained(config) and (config.run.path / STUDENT_DIRECTORY).is_dir()
    )


def export_run(config: RunConfig) -> Path:
    """Write `student/` from the run's last whole checkpoint.

    Raises CheckpointError if there is none, and ExportError where what was written is not the student: it is left in
    `student.unverified/`, to be looked at, and takes no earlier student's place.
    """
    checkpoint = checkpoints_of(config).newest_whole()
    if checkpoint is None:
        raise CheckpointError(f"{config.run.path}: has no checkpoint to export; run it first")
    averaged = config.learner.ema_decay > 0
    weights = load_file(averaged_weights(checkpoint) if averaged else checkpoint / "student.safetensors")
    path = _export(config, weights, config.run.path / STUDENT_DIRECTORY)
    write_card(config)
    return path


def export_best(config: RunConfig) -> Best | None:
    """Write `student_best/` where the run kept its best student, and say which that is; None where it keeps none.

    One whose file is damaged is left out, with a warning. Raises ExportError as `export_run` does.
    """
    shutil.rmtree(config.run.path / BEST_DIRECTORY, ignore_errors=True)  # of an earlier, shorter run
    measure = Measure.of(config)
    if measure is None:
        return None
    try:
        best = read_best(config.run.path / KEPT_DIRECTORY)
    except DataError as error:
        logger.warning("there is no student_best: %s", error)
        return None
    if best is None or best.measure != measure:
        return None
    kept = find_kept(config.run.path / KEPT_DIRECTORY, best)
    if kept is None:
        logger.warning("there is no student_best: %s is not as it was written", best.file)
        return None
    _export(config, load_file(kept), config.run.path / BEST_DIRECTORY, best=best)
    write_card(config, best=best)
    return best


def _export(config: RunConfig, weights: Mapping[str, Tensor], path: Path, *, best: Best | None = None) -> Path:
    problem = ImitationProblem.create(config, default_device())
    unverified = path.with_name(path.name + UNVERIFIED_SUFFIX)
    export_student(problem, weights, unverified)
    verify_export(problem, weights, unverified, ["", "a photo"], guidance_scale=config.evaluation_guidance_scale)
    if best is not None:
        write_best(unverified, best)
    if adapter_path(unverified).is_dir():
        replace_directory(adapter_path(path), adapter_path(unverified))
    replace_directory(path, unverified)
    return path
