"""What a run is at now, as markup, from the monitor's report of it (`ddil_dist.monitor.report`)."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from ddil_dist.dashboard.watch import Now
from ddil_dist.data.skipped import sentence
from ddil_dist.report.html import Colour, Html, count, duration, el, join, percent, size, stacked_bar, table
from ddil_dist.runs import base_directory

SOURCES: dict[str, Colour] = {"forward": "forward", "student": "student", "teacher": "teacher", "noise": "gold"}
AGES: tuple[Colour, ...] = ("accent", "teacher", "plum", "gold", "student", "warn", "forward", "muted")
MOST_ACTORS = 64


def now_panel(now: Now) -> Html:
    """The whole of it; where the run cannot be asked, why, and since when."""
    if now.report is None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now.since))
        return el("div", el("p", str(now.reason), class_="problem"), el("p", f"So since {since}.", class_="small"))
    report = now.report
    calm = "nobody waits" in report["bottleneck"] or report["process"] is not None
    parts = [el("p", report["bottleneck"], class_="state calm" if calm else "state")]
    if report["stop_reason"]:
        parts.append(el("p", f"Stopping: {report['stop_reason']}", class_="problem"))
    if report["learner"].get("error"):
        parts.append(el("p", str(report["learner"]["error"]), class_="problem"))
    if report["skipped"] is not None:
        parts.append(el("p", sentence(report["skipped"]) + ".", class_="problem"))
    parts.append(el("dl", *_tiles(report), class_="tiles"))
    if report["replay"] is not None:
        parts.append(el("div", *_replay(report["replay"]), class_="bars now-bars"))
        parts.append(_actors(report))
    return el("div", *parts)


def commands_panel(directory: Path, name: str) -> Html:
    """The commands that change a run, to copy: this page changes nothing."""
    run = f"--run {shlex.quote(name)}"
    if directory.resolve() != (base_directory() / "runs").resolve():
        run += f" --directory {shlex.quote(str(directory))}"
    told = [
        ("Scale", f"python -m ddil_dist.scale {run} --rollouts 4"),
        ("Pause the actors", f"python -m ddil_dist.scale {run} --rollouts 0"),
        ("Stop, with a checkpoint", f"python -m ddil_dist.stop {run}"),
        ("Watch in a terminal", f"python -m ddil_dist.monitor {run}"),
    ]
    rows = [
        el(
            "li",
            el("b", label),
            el("code", command),
            el("button", "Copy", type="button", class_="copy", aria_label=f"Copy: {label}"),
        )
        for label, command in told
    ]
    return el("details", el("summary", "Commands"), el("ul", *rows, class_="commands"))


def _tile(label: str, value: str, note: str = "") -> Html:
    return el("div", el("dt", label), el("dd", value, el("small", note)), class_="tile")


def _tiles(report: dict[str, Any]) -> list[Html]:
    learner, weights, replay, process = (report[key] for key in ("learner", "weights", "replay", "process"))
    tiles = []
    if "update" in learner:
        total = learner.get("total_updates") or 0
        share = f"{percent(learner['update'] / total)} of {count(total)}" if total else ""
        tiles.append(_tile(f"update ({learner.get('phase', 'training')})", count(learner["update"]), share))
    elif process is not None:
        tiles.append(_tile(process["phase"], f"{process['done']} of {process['total']}", process["policy"] or ""))
    else:
        tiles.append(_tile("learner", str(learner.get("phase", "not heard of"))))
    if _is_number(learner.get("loss")):
        tiles.append(_tile("loss", f"{learner['loss']:.4g}", "of the newest update"))
    if _is_number(learner.get("updates_per_s")):
        left = f"{duration(learner['left_s'])} left" if _is_number(learner.get("left_s")) else ""
        waits = f", waiting {percent(learner['wait_share'])}" if _is_number(learner.get("wait_share")) else ""
        tiles.append(_tile("updates a second", f"{learner['updates_per_s']:.3g}", left + waits))
    if weights is not None:
        have = f"applied by {len(weights['applied_by'])} of {len(report['actors'])} actors"
        tiles.append(_tile("student's version", count(weights["version"]), f"{size(weights['size_bytes'])}, {have}"))
    if replay is not None:
        rates = f"{replay['inserts_per_s']:.3g} in, {replay['samples_per_s']:.3g} out a second"
        tiles.append(_tile("states in the buffer", count(replay["size"]), f"of {count(replay['capacity'])}; {rates}"))
    return tiles


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _replay(replay: dict[str, Any]) -> list[Html]:
    bars = []
    if replay["by_source"]:
        parts = [(name, float(num), SOURCES.get(name, "muted")) for name, num in replay["by_source"].items()]
        bars.append(stacked_bar("Who made them", f"{count(replay['size'])} live states", parts))
    if replay["ages"]:
        parts = [(each["label"], float(each["num"]), AGES[i % len(AGES)]) for i, each in enumerate(replay["ages"])]
        bars.append(stacked_bar("How old they are", "student updates since their policy", parts))
    waits = [(name, share) for name, share in replay["waits"].items() if share >= 0.005]
    told = ", ".join(f"{name} {percent(share)}" for name, share in waits) or "nobody waits"
    limiter = replay["limiter"]["settings"]
    rule = f"{limiter['samples_per_insert']:g} samples an insert, from {limiter['min_size']:g} states on"
    starved = replay["never_sampled"]
    never = "" if starved is None else f" {percent(starved['share'])} of all inserted states were never sampled."
    bars.append(el("p", f"Waiting: {told}. The limiter: {replay['limiter']['state']}; {rule}.{never}", class_="small"))
    return bars


def _actors(report: dict[str, Any]) -> Html:
    rows = [
        (
            actor["name"],
            actor["state"] if not actor["failed"] else el("td", str(actor["failed"]), class_="failed"),
            "" if actor["states_per_s"] is None else f"{actor['states_per_s']:.3g}",
            "" if actor["waiting_share"] is None else percent(actor["waiting_share"]),
            "" if actor["version"] is None else str(actor["version"]),
            "" if actor["versions_behind"] is None else str(actor["versions_behind"]),
            f"{duration(actor['beat_age_s'])} ago",
        )
        for actor in report["actors"][:MOST_ACTORS]
    ]
    told = f"{len(report['actors'])} heard of, {report['wanted_actors']} wanted"
    if len(report["actors"]) > MOST_ACTORS:
        told += f"; the first {MOST_ACTORS} are shown"
    if report["autoscale"] is not None:
        told += "; autoscaled from {} to {}".format(*report["autoscale"])
    if report["fleet"].get("waiting_for_a_place"):
        told += f"; {report['fleet']['waiting_for_a_place']} wait for a node with their resources"
    head = ("actor", "state", "states a second", "waits", "version", "updates behind", "heard")
    drawn = table(head, rows) if rows else Html("")
    return join([el("h3", "Rollout actors ", el("small", told)), drawn])
