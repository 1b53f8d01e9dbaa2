"""A run's directory as data: config, results, journal lines by kind, sample grids. Reads; computes nothing.

The run's journals, the learner's and the launcher's, hold one JSON object a line, with "kind" and "time" (unix
seconds) in each:

    update    update, total_updates, loss, loss_by_source, loss_by_timestep, grad_norm, learning_rate, staleness_mean,
              staleness_max, sources, policy_versions, wait_s, label_s, compute_s, update_s
    publish   version, digest, size_bytes, seconds          weights published
    applied   actor, version                                an actor took them
    replay    size, size_bytes, num_inserted, num_sampled (totals), by_source, by_version (live now),
              never_sampled (num, share, live, by_timestep, by_actor, of all that were inserted)
    rollout   actor, states, teacher_calls, student_calls, batch_fill, network_s, insert_wait_s, tick_s
              (amounts since the actor's last such line; network_s and insert_wait_s are parts of tick_s)
    skipped   num_rows, num_skipped, skipped by reason      rows of the data found unusable so far, where there are any
    memory    weights_bytes, gradients_bytes, optimizer_bytes, average_bytes, activations_bytes, rows
    micro_batch
              update, rows                                  out of memory: smaller micro-batches from there on
    look      update, latent_std, saturation                 of the student's samples over the teacher's
    held_out  update, metric, value, best_update, best_value, seconds   (learner.keep_best)
    phase     name, seconds

Any key or kind may be missing, and lines that a killed writer tore are skipped. A run that was resumed from a
checkpoint repeats updates: what the earlier attempt did from there on is dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddil_dist.analysis.results import ANALYSIS_FILE, Analysis, read_analysis
from ddil_dist.config import RunConfig, load_config
from ddil_dist.errors import ConfigError, DataError, EnvironmentFailure
from ddil_dist.journal import EVENTS_FILE, METRICS_FILE, read_journal
from ddil_dist.metrics.results import RESULTS_FILE, Results, read_results
from ddil_dist.report.samples import SampleGrid, read_sample_grid
from ddil_dist.runs import CONFIG_FILE, unfinished

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run has left so far; a part that is not there is None or empty."""

    directory: Path
    config: RunConfig | None = None
    config_text: str | None = None
    """The file as written."""
    results: Results | None = None
    lines: Mapping[str, Sequence[Line]] = field(default_factory=dict)
    """By kind, in the order of the file."""
    samples: SampleGrid | None = None
    analysis: Analysis | None = None
    unfinished: str | None = None
    """What its end lacks, such as an evaluation that failed, and how to go on."""
    problems: Sequence[str] = ()
    """Files that could not be read, one sentence each."""

    def of(self, kind: str) -> Sequence[Line]:
        """The lines of a kind, none if there are none."""
        return self.lines.get(kind, ())

    @property
    def updates(self) -> Sequence[Line]:
        return self.of("update")


def read_run(directory: Path) -> RunRecord:
    """Read what there is; raises EnvironmentFailure if `directory` is no directory. Never fails for a broken file."""
    if not directory.is_dir():
        raise EnvironmentFailure(f"{directory} is no directory; give the directory of a run, such as runs/demo")
    problems: list[str] = []
    config, config_text = _read_config(directory / CONFIG_FILE, problems)
    lines = _read_lines([directory / METRICS_FILE, directory / EVENTS_FILE])
    results: Results | None = None
    if (directory / RESULTS_FILE).is_file():
        try:
            results = read_results(directory / RESULTS_FILE)
        except DataError as error:
            problems.append(str(error))
    analysis: Analysis | None = None
    if (directory / ANALYSIS_FILE).is_file():
        try:
            analysis = read_analysis(directory / ANALYSIS_FILE)
        except DataError as error:
            problems.append(str(error))
    samples: SampleGrid | None = None
    try:
        samples = read_sample_grid(directory)
    except DataError as error:
        problems.append(str(error))
    return RunRecord(directory, config, config_text, results, lines, samples, analysis, unfinished(directory), problems)


def _read_config(path: Path, problems: list[str]) -> tuple[RunConfig | None, str | None]:
    if not path.is_file():
        return None, None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return load_config(path), text
    except ConfigError as error:
        problems.append(f"{path.name} does not fit this version: {error}")
        return None, text


def _read_lines(paths: Sequence[Path]) -> dict[str, list[Line]]:
    by_kind: dict[str, list[Line]] = defaultdict(list)
    for path in paths:
        for line in read_journal(path):
            if isinstance(line, dict) and isinstance(line.get("kind"), str):
                _append(by_kind, line)
    return by_kind


def _append(by_kind: dict[str, list[Line]], line: Line) -> None:
    """Add a line; an update or version that does not follow the last begins another attempt, which replaces."""
    lines = by_kind[line["kind"]]
    order = {"update": "update", "publish": "version", "held_out": "update"}.get(line["kind"])
    if order is not None:
        if not isinstance(line.get(order), int):
            return
        while lines and lines[-1][order] >= line[order]:
            lines.pop()
    lines.append(line)
