"""Escaping, units, and drawings that follow the theme."""

from __future__ import annotations

import re

import pytest
from matplotlib.axes import Axes

from ddil_dist.report.charts import COLOURS, Chart, figure, line
from ddil_dist.report.html import Html, count, duration, el, join, legend, percent, plural, size, stacked_bar


def test_text_is_escaped_and_markup_is_not() -> None:
    inner = el("b", "a < b & c")
    assert inner == "<b>a &lt; b &amp; c</b>"
    assert el("p", inner, " <i>", class_="x", title='"<') == (
        '<p class="x" title="&quot;&lt;"><b>a &lt; b &amp; c</b> &lt;i&gt;</p>'
    )
    assert join(["<", Html("<")]) == "&lt;<"
    assert el("br") == "<br>"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0061, "6.1 ms"), (0.0834, "83 ms"), (0.25, "0.25 s"), (9.4, "9.4 s"), (59.2, "59 s"), (60, "1 min"),
     (464, "7 min 44 s"), (3600, "1 h"), (9000, "2 h 30 min")],
)  # fmt: skip
def test_durations_read_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_counts_and_shares() -> None:
    assert [size(512), size(7_340_032), size(3 * 2**30)] == ["512 B", "7 MiB", "3 GiB"]
    assert count(17820) == "17\u202f820"
    assert [percent(share) for share in (0.314, 0.004, 0.0001, 0, 0.998, 1)] == [
        "31%", "0.4%", "<0.1%", "0%", "99.8%", "100%",
    ]  # fmt: skip
    assert [plural(1, "state"), plural(2000, "state")] == ["1 state", "2\u202f000 states"]


def test_a_bar_gives_each_part_its_share_and_leaves_out_nothing_else() -> None:
    bar = stacked_bar(
        "Learner", "4 s", [("waiting", 1.0, "warn"), ("labels", 0.0, "teacher"), ("training", 3.0, "accent")]
    )
    assert re.findall(r"flex-grow:([\d.]+)", bar) == ["0.25000", "0.75000"]
    assert "labels" not in bar


def test_a_dashed_key_is_a_line() -> None:
    assert 'class="dash" style="border-color:var(--ink)"' in legend([("wanted", "ink dashed")])


def test_a_chart_is_drawn_in_theme_colours_at_two_widths_with_ids_of_their_own() -> None:
    def draw(axes: Axes) -> None:
        line(axes, [0, 1, 2], [0, 1, 0], "student")
        axes.fill_between([0, 1], 0, [1, 1], color=COLOURS["teacher"])

    drawn = figure(Chart("A <title>", draw, keys=[("a key", "student")]))
    assert drawn.count("<svg ") == 2
    assert drawn.count("var(--student)") == 3  # two drawings and the key
    assert "var(--muted)" in drawn
    assert not [stand_in for stand_in in COLOURS.values() if stand_in in drawn]
    ids = re.findall(r' id="([^"]+)"', drawn)
    assert len(ids) == len(set(ids)) > 0
    assert "<title>" not in drawn
