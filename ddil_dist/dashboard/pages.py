"""The dashboard's pages: all runs, and one run with its report below what it is at now."""

from __future__ import annotations

from importlib.resources import files
from urllib.parse import quote

from ddil_dist.dashboard.panels import commands_panel, now_panel
from ddil_dist.dashboard.watch import Runs, RunWatch
from ddil_dist.report.html import Html, el, join, missing
from ddil_dist.report.page import document


def runs_page(runs: Runs) -> str:
    """All runs of the directory."""
    body = [
        el(
            "header",
            el("p", "ddil_dist", class_="eyebrow"),
            el("h1", "Runs"),
            el("p", str(runs.directory.resolve()), class_="subtitle"),
        ),
        el("main", el("div", runs_list(runs), id="now")),
    ]
    return document("Runs", *body, head=_head())


def runs_list(runs: Runs) -> Html:
    """The runs, each with what it is at."""
    rows = []
    for name in runs.names():
        watch = runs.get(name)
        if watch is not None:
            now = watch.now()
            told = now.reason if now.report is None else now.report["bottleneck"]
            told = str(told).removeprefix(f"run {name!r} ")
            rows.append(el("li", el("a", name, href=f"/runs/{quote(name)}"), el("span", told)))
    return el("ul", *rows, class_="runs") if rows else missing("There is no run here yet: python -m ddil_dist.launch")


def run_page(runs: Runs, watch: RunWatch) -> str:
    """One run."""
    name = watch.path.name
    body = [
        el(
            "main",
            el("p", el("a", "All runs", href="/"), class_="back"),
            el("h2", f"{name}, now"),
            el("div", now_panel(watch.now()), id="now", aria_live="off"),
            commands_panel(runs.directory, name),
            class_="now",
        ),
        el("div", Html(watch.sections()), id="report"),
    ]
    return document(f"{name}: dashboard", *body, head=_head())


def style_sheet() -> str:
    """Of the report, and what the dashboard has besides."""
    return "\n".join(
        files(f"ddil_dist.{package}").joinpath(name).read_text(encoding="utf-8")
        for package, name in (("report", "style.css"), ("dashboard", "dashboard.css"))
    )


def script() -> str:
    """Swaps in what the server sends."""
    return files("ddil_dist.dashboard").joinpath("dashboard.js").read_text(encoding="utf-8")


def _head() -> Html:
    return join(
        [
            el("link", rel="stylesheet", href="/dashboard.css"),
            el("script", src="/dashboard.js", defer="defer"),
        ]
    )
