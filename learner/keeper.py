"""Keeping the best student: rank 0 measures the average that would be exported, and writes it where it leads.

`kept/` has the weights and `best.json`, which says what they are worth and which file they are. The record is replaced
last, so a kill at any moment leaves the best before. It is apart from the checkpoints, whose newest may be worse, and
outlives a restart: also a student of an attempt that a restart went back behind was trained and measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ddil_dist.best import KEPT_DIRECTORY, Best, Measure, read_best, write_best
from ddil_dist.compiling import eagerly
from ddil_dist.config import RunConfig
from ddil_dist.errors import DataError
from ddil_dist.journal import Journal
from ddil_dist.problem import ImitationProblem
from learner.checkpoint import digest_of
from learner.held_out import HeldOut
from learner.state_file import at_rest
from learner.tensor_file import write_tensors
from learner.training_state import random_state, set_random_state

PARTIAL_FILE = "student.partial"

logger = logging.getLogger(__name__)


class Keeper:
    """Measures students and keeps the best. Raises ConfigError where they cannot be measured.

    It has a network of its own, so that sharded and compiled students are measured as any other.
    """

    def __init__(self, config: RunConfig, problem: ImitationProblem, measure: Measure, journal: Journal | None) -> None:
        assert config.learner.keep_best is not None
        self._every, self._last = config.learner.keep_best.every, config.learner.updates
        self._compile = config.learner.compile
        self._directory = config.run.path / KEPT_DIRECTORY
        self._measure = measure
        state = random_state()
        self._held_out = HeldOut(config, problem, measure)
        self._network = problem.new_student().eval()
        set_random_state(state)  # networks draw their first weights, and what is trained is not to notice
        self._journal = journal
        self._best = self._earlier()
        self._measured = 0

    def wants(self, update: int) -> bool:
        """Whether the student of this update is to be measured."""
        return update != self._measured and update > 0 and (update % self._every == 0 or update == self._last)

    def judge(self, weights: Mapping[str, Tensor], *, update: int) -> None:
        """Measure the student with these weights, and keep it if no other was better."""
        begun = time.monotonic()
        self._measured = update
        self._network.load_state_dict(dict(weights))
        try:
            with eagerly(self._compile):
                value = self._held_out.value(self._network)
        except torch.OutOfMemoryError as error:
            logger.warning(
                "update %d: the device has too little memory to measure the student (%s); the run goes on without, and "
                "evaluation.batch_size may be lowered",
                *(update, str(error).splitlines()[0]),
            )
            return
        best = self._best
        try:
            if value is not None and (best is None or self._measure.is_better(value, best.value)):
                best = self._keep(weights, update, value)
            elif best is not None:
                best = replace(best, last_update=update, last_value=value)
            if best is not None:
                write_best(self._directory, best)
                self._best = best
        except OSError as error:
            logger.warning("update %d: the best student cannot be kept (%s); the run goes on without", update, error)
        self._clean()
        if self._journal is not None:
            kept = {} if best is None else {"best_update": best.update, "best_value": best.value}
            seconds = time.monotonic() - begun
            self._journal.write(
                "held_out", update=update, metric=self._measure.metric, value=value, **kept, seconds=seconds
            )

    def _keep(self, weights: Mapping[str, Tensor], update: int, value: float) -> Best:
        """Write the weights; the record is to follow."""
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = self._directory / PARTIAL_FILE
        digest = write_tensors(partial, {name: at_rest(tensor) for name, tensor in weights.items()}).digest
        file = f"update_{update:08d}_{digest[:8]}.safetensors"
        partial.replace(self._directory / file)
        return Best(self._measure, update, value, update, value, file, digest)

    def _clean(self) -> None:
        """Remove the weights that the record does not name."""
        kept = None if self._best is None else self._best.file
        for path in (*self._directory.glob("update_*.safetensors"), self._directory / PARTIAL_FILE):
            if path.name != kept:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _earlier(self) -> Best | None:
        """The best that an earlier attempt kept, if it was measured alike and is whole."""
        try:
            best = read_best(self._directory)
        except DataError as error:
            logger.warning("%s; the best is sought anew", error)
            return None
        if best is None:
            return None
        if best.measure != self._measure:
            logger.warning(
                "the best student so far, of update %d, was chosen by %s of %d images; now the best is sought anew",
                *(best.update, best.measure.metric, best.measure.num_images),
            )
            return None
        if find_kept(self._directory, best) is None:
            logger.warning("the best student so far, of update %d, is damaged; the best is sought anew", best.update)
            return None
        return best


def find_kept(directory: Path, best: Best) -> Path | None:
    """The file of the best student's weights, beside its record; None where it is not as it was written."""
    path = directory / best.file
    with suppress(OSError):
        if digest_of(path) == best.digest:
            return path
    return None
