"""Charts as inline SVG that follow the page's theme and fit its width.

matplotlib draws with stand-in colours, which become CSS variables afterwards, so that one drawing serves light and
dark. Text stays text, in the page's font. A full-width chart is drawn twice, wide and narrow, because a drawing that
is only scaled down to a phone cannot be read; the style sheet shows one of the two.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ddil_dist.report.html import Colour, Html, el, legend
from ddil_dist.report.series import Shares, VersionMap

COLOURS: Final[dict[Colour, str]] = {
    "ink": "#010300",
    "muted": "#010301",
    "grid": "#010302",
    "forward": "#010303",
    "student": "#010304",
    "teacher": "#010305",
    "accent": "#010306",
    "warn": "#010307",
    "gold": "#010308",
    "plum": "#010309",
}
"""Stand-ins that matplotlib draws with, by the CSS variable that replaces them."""

HEAT_RGB: Final = (0.89, 0.42, 0.20)
"""Of the heat map, a picture and thus of one colour on both themes; its opacity is the value."""

SOURCE_COLOURS: Final[dict[str, Colour]] = {
    "FORWARD": "forward",
    "STUDENT": "student",
    "TEACHER": "teacher",
    "NOISE": "muted",
}
SOURCE_LABELS: Final = {
    "FORWARD": "forward diffusion",
    "STUDENT": "student",
    "TEACHER": "teacher",
    "NOISE": "pure noise",
}


@dataclass(frozen=True)
class Chart:
    """A drawing and the words around it."""

    title: str
    draw: Callable[[Axes], None]
    note: str = ""
    """What is on the axes, in the title's line."""
    keys: Sequence[tuple[str, Colour]] = ()
    wide: bool = True
    """Over the page's whole width, else over half of it."""
    height: int = 300


def figure(chart: Chart) -> Html:
    """The chart with title, key and drawing."""
    caption = el("figcaption", el("b", chart.title), *([" ", el("span", chart.note)] if chart.note else []))
    keys = [legend(chart.keys)] if chart.keys else []
    label = f"{chart.title}. {chart.note}"
    if chart.wide:
        drawings = [
            el("div", svg(chart.draw, width=980, height=chart.height, label=label, salt="w"), class_="only-wide"),
            el("div", svg(chart.draw, width=430, height=260, label=label, salt="n"), class_="only-narrow"),
        ]
    else:
        drawings = [svg(chart.draw, width=430, height=chart.height, label=label, salt="h")]
    return el("figure", caption, *keys, *drawings, class_="wide" if chart.wide else "half")


def svg(draw: Callable[[Axes], None], *, width: int, height: int, label: str, salt: str) -> Html:
    """An SVG of `width` x `height` CSS pixels that scales to its container. `salt` keeps ids apart on the page."""
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{salt}-{label}",
        "font.size": 12.0,
        "path.simplify": True,
        "image.composite_image": False,
    }
    with mpl.rc_context(settings):
        drawing = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        axes = drawing.add_subplot()
        _plain(axes, narrow=width < 600)
        draw(axes)
        buffer = io.StringIO()
        drawing.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    body = text[text.index("<svg") : text.rindex("</svg>")]
    body = re.sub(r"<svg[^>]*>", "", body, count=1)
    # Names such as "axes_1", the same in every drawing; what is referred to has a salted hash instead.
    body = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", body)
    body = re.sub(r"\n\s*", "\n", body)
    for name, stand_in in COLOURS.items():
        body = body.replace(stand_in, f"var(--{name})")
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_attribute(label)}">'
    return Html(f"{opening}{body}</svg>")


def _attribute(text: str) -> str:
    return re.sub(r'[<>&"]', " ", text)


def _plain(axes: Axes, *, narrow: bool) -> None:
    """Quiet axes: horizontal grid, no frame, few ticks."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(COLOURS["grid"])
    axes.grid(axis="y", color=COLOURS["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=COLOURS["muted"], pad=6)
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.01)


def x_label(axes: Axes, text: str) -> None:
    """The x axis's quantity, small, at its right end."""
    axes.set_xlabel(text, loc="right", color=COLOURS["muted"], fontsize=12, labelpad=2)


def line(axes: Axes, x: npt.ArrayLike, y: npt.ArrayLike, colour: Colour, **style: Any) -> None:
    """A line in a theme colour; a dot where there is one point only."""
    style = {"linewidth": 2.0, "solid_capstyle": "round", "marker": "o" if np.size(x) == 1 else None, **style}
    axes.plot(x, y, color=COLOURS[colour], **style)


def stacked_sources(axes: Axes, drawn: Shares) -> None:
    """Shares by source as stacked areas from 0 to 1."""
    axes.stackplot(
        drawn.x, drawn.values, colors=[COLOURS[SOURCE_COLOURS[name]] for name in drawn.names], alpha=0.85, linewidth=0
    )
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.margins(x=0)


def stacked_bands(axes: Axes, x: npt.ArrayLike, values: npt.ArrayLike) -> None:
    """Amounts of bands, oldest first, as stacked areas that grow stronger towards the newest."""
    layers = np.atleast_2d(np.asarray(values, dtype=np.float64))
    base = np.zeros(layers.shape[1])
    for index, layer in enumerate(layers):
        alpha = 0.2 + 0.75 * (index + 1) / len(layers)
        axes.fill_between(x, base, base + layer, color=COLOURS["student"], alpha=alpha, linewidth=0)
        base = base + layer
    axes.set_ylim(bottom=0)
    axes.margins(x=0)


def heat_map(axes: Axes, found: VersionMap) -> None:
    """States by the version that made them, over training; the diagonal is the student that is being trained."""
    strength = np.sqrt(found.shares / max(float(found.shares.max()), 1e-12))
    picture = np.zeros((*strength.shape, 4))
    picture[..., :3] = HEAT_RGB
    picture[..., 3] = strength
    extent = (*found.update_range, *found.version_range)
    axes.imshow(picture, origin="lower", aspect="auto", interpolation="none", extent=extent, zorder=2)
    newest = [max(0.0, found.update_range[0]), found.update_range[1]]
    axes.plot(newest, newest, color=COLOURS["ink"], linewidth=1.5, linestyle=(0, (4, 3)), zorder=3)
    axes.set_xlim(*found.update_range)
    axes.set_ylim(0, max(found.version_range[1], found.update_range[1]))
