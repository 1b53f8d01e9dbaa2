"""The report as one page: header, navigation, sections, and the style sheet inside."""

from __future__ import annotations

from importlib.resources import files

from ddil_dist.data.skipped import most_skipped, sentence
from ddil_dist.report.appendix import config_section, protocol_section
from ddil_dist.report.critic import critic_section, has_critic
from ddil_dist.report.headline import header, results_section, samples_section
from ddil_dist.report.html import Html, el, join
from ddil_dist.report.learning import imitation_section, loss_section
from ddil_dist.report.progress import progress_section
from ddil_dist.report.record import RunRecord
from ddil_dist.report.series import ActiveClock, number
from ddil_dist.report.shift import shift_section
from ddil_dist.report.system import replay_section, throughput_section, time_section, weights_section

LINKS = (
    ("results", "Results"),
    ("samples", "Samples"),
    ("progress", "Progress"),
    ("shift", "Shift"),
    ("imitation", "Imitation"),
    ("loss", "Loss"),
    ("critic", "Critic"),
    ("replay", "Replay"),
    ("weights", "Weights"),
    ("throughput", "Throughput"),
    ("time", "Time"),
    ("protocol", "Protocol"),
    ("config", "Configuration"),
)
"""Anchors of the sections in the order of the page; that of the critic where there is one."""


def render_page(run: RunRecord) -> str:
    """The whole document; needs nothing beside itself."""
    css = files("ddil_dist.report").joinpath("style.css").read_text(encoding="utf-8")
    footer = el("footer", "Made by ddil_dist from the files of the run's directory; it needs no network.")
    title = f"{_name(run)}: distillation report"
    return document(title, Html(render_sections(run)), footer, head=Html(f"<style>{css}</style>"))


def document(title: str, *body: str, head: Html) -> str:
    """A page with these parts."""
    meta = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        head,
    )
    return join([Html("<!doctype html>\n"), el("html", meta, el("body", *body), lang="en")])


def render_sections(run: RunRecord) -> str:
    """The report's markup: header, navigation and sections."""
    clock = ActiveClock([number(line.get("time")) for lines in run.lines.values() for line in lines])
    sections = [
        results_section(run),
        samples_section(run),
        progress_section(run),
        shift_section(run),
        imitation_section(run),
        loss_section(run),
        *([critic_section(run)] if has_critic(run) else []),
        replay_section(run, clock),
        weights_section(run),
        throughput_section(run, clock),
        time_section(run),
        protocol_section(run),
        config_section(run),
    ]
    shown = [(anchor, text) for anchor, text in LINKS if anchor != "critic" or has_critic(run)]
    links = el("nav", el("ul", *[el("li", el("a", text, href=f"#{anchor}")) for anchor, text in shown]))
    main = el("main", *_problems(run), *_unfinished(run), *_skipped(run), *sections)
    return join([header(run, clock.seconds), links, main])


def _name(run: RunRecord) -> str:
    return run.config.run.name if run.config is not None else run.directory.name


def _problems(run: RunRecord) -> list[Html]:
    if not run.problems:
        return []
    return [
        el(
            "div",
            el("b", "Not everything could be read."),
            el("ul", *[el("li", p) for p in run.problems]),
            class_="problem",
        )
    ]


def _unfinished(run: RunRecord) -> list[Html]:
    """A line where the run's end was not whole."""
    return [] if run.unfinished is None else [el("p", f"This run {run.unfinished}.", class_="problem")]


def _skipped(run: RunRecord) -> list[Html]:
    """A line where rows of the data were skipped."""
    found = most_skipped([{"data": line} for line in run.of("skipped")])
    return [] if found is None else [el("p", sentence(found) + ".", class_="problem")]
