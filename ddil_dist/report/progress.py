"""Samples as the training went on, from the same noise each time, their look beside the teacher's, their worth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from ddil_dist.report.charts import COLOURS, Chart, figure, line, x_label
from ddil_dist.report.headline import embedded
from ddil_dist.report.held_out import held_out_charts, held_out_sentence
from ddil_dist.report.html import Html, el, lead, missing, section
from ddil_dist.report.record import RunRecord
from ddil_dist.report.series import column, thinned

DIRECTORY = "progress"
CAPTIONS_FILE = "captions.json"
MOST_ROWS = 8


def progress_section(run: RunRecord) -> Html:
    """Rows of samples by update, each column one noise and one prompt; the drift chart, and the held-out metric's."""
    files = sorted((run.directory / DIRECTORY).glob("update_*.png"))
    charts = [figure(chart) for chart in (*_look_charts(run), *held_out_charts(run))]
    told = held_out_sentence(run)
    return section(
        "progress",
        "As it trained",
        *(_pictures(run, files) if files else [missing("No pictures of the training (learner.sample_every).")]),
        *([told] if told is not None else []),
        *([el("div", *charts, class_="grid")] if charts else []),
    )


def _pictures(run: RunRecord, files: list[Path]) -> list[Html]:
    chosen = [files[round(place)] for place in np.linspace(0, len(files) - 1, min(MOST_ROWS, len(files)))]
    captions = _captions(run.directory / DIRECTORY)
    num = max(1, len(captions))
    rows = [
        el(
            "div",
            el("h3", f"update {int(file.stem.removeprefix('update_')):,}"),
            el("div", *_cut(file, num, captions), class_="strip"),
            class_="sample-row",
        )
        for file in dict.fromkeys(chosen)
    ]
    told = el("div", *[el("span", caption, title=caption) for caption in captions], class_="strip")
    drawn = el("div", *rows, el("div", told, class_="sample-row"), class_="samples", style=f"--n:{num}")
    return [lead("The student's own samples: every column starts from one noise and one prompt throughout."), drawn]


def _captions(directory: Path) -> list[str]:
    try:
        found = json.loads((directory / CAPTIONS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(caption) for caption in found] if isinstance(found, list) else []


def _cut(file: Path, num: int, captions: list[str]) -> list[Html]:
    with Image.open(file, formats=("PNG",)) as picture:
        strip = picture.convert("RGB")
    num = num if captions else max(1, strip.width // max(1, strip.height))  # of an older run, square by square
    side = strip.width // num
    return [
        embedded(
            strip.crop((place * side, 0, (place + 1) * side, strip.height)), captions[place] if captions else file.stem
        )
        for place in range(num)
    ]


def _look_charts(run: RunRecord) -> list[Chart]:
    lines = run.of("look")
    x = column(lines, "update")
    known = [
        (label, colour, column(lines, key))
        for label, colour, key in (
            ("deviation of latents", "student", "latent_std"),
            ("saturation", "gold", "saturation"),
        )
        if np.isfinite(column(lines, key)).any()
    ]
    if not known:
        return []

    def draw(axes: Axes) -> None:
        axes.axhline(1, color=COLOURS["ink"], linewidth=1.2, linestyle=(0, (4, 3)))
        for _, colour, values in known:
            line(axes, *thinned(x, values), colour)
        x_label(axes, "update")

    keys = [*((label, colour) for label, colour, _ in known), ("the teacher's", "ink dashed")]
    note = "the student's samples over the teacher's, from the same noise; far above 1 it oversaturates"
    return [Chart("Drift", draw, note, keys, wide=False, height=250)]
