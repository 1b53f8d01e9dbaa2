"""The top of the report: what was distilled, how it went in a few numbers, the metrics table, the sample grid."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ddil_dist.metrics.protocol import Metric, PolicyResult, best_names, present_metrics
from ddil_dist.report.html import Html, count, duration, el, lead, missing, plural, section, table
from ddil_dist.report.record import RunRecord
from ddil_dist.report.series import total

TINY_PIXELS = 128
"""Images below this side are shown pixel by pixel instead of blurred."""
EMBEDDED_PIXELS = 256
"""Images above this side are embedded scaled down to it."""

FACT_WORDS = {
    "export_max_abs_difference": "exported pipeline against ours, largest difference",
    "projection_max_abs_difference": "exported pipeline, which does not project, against the trained policy",
}
"""How known facts of the results file are called."""


def header(run: RunRecord, active_seconds: float) -> Html:
    """Title, one sentence, and tiles of the run's main numbers."""
    tiles = [tile for tile in (_speed(run), _quality(run), _training(run, active_seconds), _rollouts(run)) if tile]
    config = run.config
    if config is None:
        title, sentence = f"Run {run.directory.name}", [el("b", "config.yaml"), " is missing or unreadable."]
    else:
        title = f"A {config.student.steps}-step student of a {config.teacher.steps}-step teacher"
        source = "The built-in pipeline" if config.teacher.pipeline == "builtin" else config.teacher.pipeline
        sentence = [
            el("b", source),
            f", distilled by {config.objective.type} distillation on states that diffusion, the teacher, "
            "and the student itself visited.",
        ]
    name = config.run.name if config is not None else run.directory.name
    return el(
        "header",
        el("p", f"Imitation-learned distillation, run {name}", class_="eyebrow"),
        el("h1", title),
        el("p", *sentence, class_="subtitle"),
        el("dl", *tiles, class_="tiles") if tiles else Html(""),
    )


def by_role(results: Sequence[PolicyResult], role: str) -> PolicyResult | None:
    """The first policy of a role."""
    return next((result for result in results if result.role == role), None)


def _tile(label: str, value: str, note: str) -> Html:
    return el("div", el("dt", label), el("dd", value, el("small", note)), class_="tile")


def _policies(run: RunRecord) -> Sequence[PolicyResult]:
    return run.results.policies if run.results is not None else ()


def _speed(run: RunRecord) -> Html | None:
    teacher, student = by_role(_policies(run), "teacher"), by_role(_policies(run), "student")
    if teacher is None or student is None or student.seconds_per_image <= 0:
        return None
    factor = teacher.seconds_per_image / student.seconds_per_image
    times = f"{duration(teacher.seconds_per_image)} to {duration(student.seconds_per_image)}"
    return _tile("Faster than the teacher", f"{factor:.3g}\u00d7", f"{times} an image")


def _quality(run: RunRecord) -> Html | None:
    student = by_role(_policies(run), "student")
    metrics = present_metrics([student]) if student is not None else []
    if student is None or not metrics:
        return None
    metric = metrics[0]
    others = [
        f"{metric.show(other.metrics.get(metric.key))} {other.name}"
        for other in _policies(run)
        if other is not student and metric.key in other.metrics
    ]
    note = "; ".join(others[:2]) or f"{metric.better} is better"
    return _tile(f"Student's {metric.label}", metric.show(student.metrics[metric.key]), note)


def _training(run: RunRecord, active_seconds: float) -> Html | None:
    if not run.updates:
        return None
    done, wanted = run.updates[-1].get("update"), run.updates[-1].get("total_updates")
    of = f" of {count(wanted)}" if isinstance(wanted, int) and wanted != done else ""
    return _tile("Student updates", f"{count(float(done or 0))}{of}", f"whole run {duration(active_seconds)}")


def _rollouts(run: RunRecord) -> Html | None:
    states = total(run.of("rollout"), "states")
    if not states:
        return None
    actors = len({line.get("actor") for line in run.of("rollout")})
    by = f"by {plural(actors, 'rollout actor')} with {plural(len(run.of('publish')), 'student version')}"
    return _tile("States visited", count(states), by)


def results_section(run: RunRecord) -> Html:
    """The metrics table, the best of each column marked, and a sentence of comparison."""
    results = _policies(run)
    if not results:
        return section("results", "Results", missing("No results.json yet: the evaluation has not run."))
    metrics = present_metrics(results)
    best = {metric.key: best_names(results, metric) for metric in metrics}
    head = ["policy", "steps", "NFEs", *[f"{metric.label}\u00a0{metric.arrow}" for metric in metrics], "time an image"]
    rows = [[_name(result), *_cells(result, metrics, best)] for result in results]
    return section(
        "results",
        "Results",
        lead(*_comparison(results, metrics)),
        table(head, rows),
        el(
            "p",
            "Arrows point to the better direction; marked is the best apart from the teacher, which is the measure. "
            "NFEs are network evaluations for one image. Under a number stands its 95% interval over images; another "
            "training run may differ by more.",
            class_="small",
        ),
        *_facts(run),
    )


def _name(result: PolicyResult) -> Html:
    role = [] if result.role in result.name else [el("span", result.role, class_="role")]
    return el("span", result.name, *role)


def _cells(result: PolicyResult, metrics: Sequence[Metric], best: dict[str, set[str]]) -> list[str]:
    cells: list[str] = [str(result.protocol.steps), str(result.protocol.nfes_per_image)]
    for metric in metrics:
        marked = "best" if result.name in best[metric.key] else None
        cells.append(el("td", metric.show(result.metrics.get(metric.key)), *_interval(result, metric), class_=marked))
    return [*cells, duration(result.seconds_per_image)]


def _interval(result: PolicyResult, metric: Metric) -> list[Html]:
    """The ends of the metric's interval, small, under its value."""
    ends = result.intervals.get(metric.key)
    return [] if ends is None else [el("br"), el("small", " to ".join(metric.show(end) for end in ends))]


def _comparison(results: Sequence[PolicyResult], metrics: Sequence[Metric]) -> list[str]:
    """Student against the first baseline of as many steps, by every metric that both have."""
    student = by_role(results, "student")
    if student is None:
        return ["No student among the policies yet."]
    baseline = next((r for r in results if r.role == "baseline" and r.protocol.steps == student.protocol.steps), None)
    if baseline is None:
        return [f"{student.name}, measured as the protocol below says."]
    names = []
    for metric in metrics:
        ours, theirs = student.metrics.get(metric.key, np.nan), baseline.metrics.get(metric.key, np.nan)
        if not np.isfinite([ours, theirs]).all():
            continue
        ahead = ours < theirs if metric.better == "lower" else ours > theirs
        names.append((metric.label, ahead))
    won = [label for label, ahead in names if ahead]
    return [
        f"At {student.protocol.steps} steps, the student is ahead of “{baseline.name}” in ",
        el("b", f"{len(won)} of {len(names)} metrics"),
        f" ({', '.join(won)})." if won else ".",
    ]


def _facts(run: RunRecord) -> list[Html]:
    facts = dict(run.results.facts) if run.results is not None else {}
    simple = {key: value for key, value in facts.items() if isinstance(value, (str, int, float))}
    if not simple:
        return []
    pairs = [
        el(
            "div",
            el("dt", FACT_WORDS.get(key, key.replace("_", " "))),
            el("dd", f"{value:.3g}" if isinstance(value, float) else str(value)),
        )
        for key, value in simple.items()
    ]
    return [el("h3", "Besides"), el("dl", *pairs, class_="facts")]


def samples_section(run: RunRecord) -> Html:
    """The sample grid: policies down, prompts across."""
    grid = run.samples
    if grid is None or not grid.rows or not grid.captions:
        return section("samples", "Samples", missing("No sample grid yet: the images are drawn after the training."))
    rows = [
        el(
            "div",
            el("h3", row.label),
            el(
                "div", *[embedded(image, c) for image, c in zip(row.images, grid.captions, strict=True)], class_="strip"
            ),
            class_="sample-row",
        )
        for row in grid.rows
    ]
    captions = el("div", *[el("span", caption, title=caption) for caption in grid.captions], class_="strip")
    return section(
        "samples",
        "Samples",
        lead(
            "Every column starts from one noise and one prompt, whoever denoises it: the closer a row is to the "
            "teacher's, the better the imitation."
        ),
        el("div", *rows, el("div", captions, class_="sample-row"), class_="samples", style=f"--n:{len(grid.captions)}"),
    )


def embedded(image: Image.Image, caption: str) -> Html:
    """An image inside the page, larger where it is clicked: PNG where it is small, else scaled down and JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= EMBEDDED_PIXELS:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        smaller = image.copy()
        smaller.thumbnail((EMBEDDED_PIXELS, EMBEDDED_PIXELS), Image.Resampling.LANCZOS)
        smaller.save(buffer, "JPEG", quality=90)
        kind = "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    tiny = "tiny" if max(image.size) < TINY_PIXELS else None
    return el("img", src=f"data:image/{kind};base64,{data}", alt=caption, title=caption, class_=tiny, tabindex="0")
