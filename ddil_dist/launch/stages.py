"""A curriculum's stages, one after the other: each an ordinary run with its checkpoints, student and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ddil_dist.config import RunConfig
from ddil_dist.config.curriculum import BEST_DIRECTORY, STUDENT_DIRECTORY
from ddil_dist.ending import EXIT_INTERRUPTED
from ddil_dist.launch.finish import is_finished
from ddil_dist.launch.prepare import prepared_run
from ddil_dist.status import is_asked_to_stop


def run_stages(config: RunConfig, stages: Sequence[RunConfig], run: Callable[[RunConfig], int]) -> int:
    """Run what is left of the stages; the exit code of the first that is stopped, else 0.

    At the end the run's `student` is the last stage's, and so is its `student_best`, where one was kept. A request to
    stop holds for the whole, whichever stage it finds.
    """
    for number, stage in enumerate(stages, start=1):
        title = f"stage {number} of {len(stages)}: {stage.objective.type}, {stage.student.steps} steps"
        with prepared_run(stage):
            if is_finished(stage):
                print(f"ddil_dist: {title}: finished before")
                continue
            print(f"ddil_dist: {title}", flush=True)
            code = run(stage)
            asked = is_asked_to_stop(stage.run.path) or is_asked_to_stop(config.run.path)
        if code:
            return code
        if asked and number < len(stages):
            print(f"ddil_dist: stopped after {title}; run the same command again to go on with the next")
            return EXIT_INTERRUPTED
    for name in (STUDENT_DIRECTORY, BEST_DIRECTORY):
        if (stages[-1].run.path / name).is_dir():
            _point(config.run.path / name, stages[-1].run.path / name)
    return 0


def _point(link: Path, target: Path) -> None:
    """Make `link` a relative link to `target`, in one step."""
    draft = link.with_name(link.name + ".partial")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target.relative_to(link.parent), target_is_directory=True)
    draft.replace(link)
