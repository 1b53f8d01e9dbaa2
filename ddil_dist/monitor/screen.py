"""A report as a terminal shows it: panels side by side where there is room for all of them, else the gist in lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ddil_dist.data.skipped import sentence
from ddil_dist.replay.unused import most_starved, starved_share

WIDE: Final = 100
TALL: Final = 40
"""Columns and rows from which there is room for the panels."""

MOST_ACTORS: Final = 24
MOST_TIMESTEPS: Final = 12
FLEET_WORDS: Final = {
    "waiting_for_a_place": "wait for a node with their resources",
    "backing_off": "failed and are tried again",
    "stopping": "are stopping",
}
BLOCKS: Final = "▏▎▍▌▋▊▉█"


class Screen:
    """Draws one report to the room at hand."""

    def __init__(self, report: dict[str, Any]) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report, replay = self._report, self._report["replay"]
        yield self._headline()
        if replay is None:
            if report["process"] is not None:
                yield _process(report["process"])
            return
        height = options.height or console.size.height
        if options.max_width < WIDE or height < TALL:
            yield from _gist(report, replay, height - 2)
            return
        panels = [
            Panel(_buffer(replay), title="buffer", title_align="left"),
            Panel(_limiter(replay), title="who waits for whom", title_align="left"),
            Panel(_sources(replay), title="share by source", title_align="left"),
            Panel(_ages(replay), title="age in student updates", title_align="left"),
            Panel(_timesteps(replay), title="live states by timestep", title_align="left"),
            Panel(_learner(report), title="learner and weights", title_align="left"),
        ]
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        for left, right in zip(panels[::2], panels[1::2], strict=True):
            grid.add_row(left, right)
        yield grid
        yield Panel(_actors(report, wide=True), title="rollout actors", title_align="left")

    def _headline(self) -> Text:
        report = self._report
        line = Text.assemble((f" {report['run']} ", "bold reverse"), "  ")
        calm = "nobody waits" in report["bottleneck"]
        line.append(report["bottleneck"], style="bold green" if calm else "bold yellow")
        if report["stop_reason"]:
            line.append(f"  stopping: {report['stop_reason']}", style="bold red")
        if report["skipped"] is not None:
            line.append(f"\n {sentence(report['skipped'])}", style="yellow")
        return line


def _process(process: dict[str, Any]) -> RenderableType:
    """How far the run's own process is, and the time ahead."""
    line = Text(" ").append_text(_bar(process["done"] / max(1, process["total"]), width=40))
    if process["left_s"] is not None:
        line.append(f"  {_duration(process['left_s'])} left")
    return line


def _gist(report: dict[str, Any], replay: dict[str, Any], height: int) -> Iterator[RenderableType]:
    """The report in at most `height` lines: the learner, the weights, the buffer, and as many actors as fit."""
    learner, weights = report["learner"], report["weights"]
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    update, total = learner.get("update"), learner.get("total_updates") or 0
    told = [str(learner.get("phase", "not heard of"))]
    if update is not None:
        told.append(f"update {_of(update, total, _number)}")
    if isinstance(learner.get("loss"), float):
        told.append(f"loss {learner['loss']:.4g}")
    table.add_row("learner", ", ".join(told), _bar((update or 0) / max(1, total)))
    pace = _pace(learner)
    if pace:
        table.add_row("", pace, "")
    if learner.get("error"):
        table.add_row("", Text(str(learner["error"]), style="bold red"), "")
    if weights is not None:
        have = f"applied by {len(weights['applied_by'])} of {len(report['actors'])} actors"
        table.add_row("weights", f"version {weights['version']}, {_bytes(weights['size_bytes'])}, {have}", "")
    full = replay["size"] / max(1, replay["capacity"])
    table.add_row("buffer", f"{_of(replay['size'], replay['capacity'], _number)} states", _bar(full))
    rates = f"{_number(replay['inserts_per_s'])} inserts/s, {_number(replay['samples_per_s'])} samples/s"
    refused = replay["num_refused"]
    table.add_row("", rates + (f", {_number(refused)} refused" if refused else ""), "")
    live = ", ".join(f"{name} {share:.0%}" for name, share in replay["share_by_source"].items())
    table.add_row("sources", live or "none yet", "")
    if replay["never_sampled"] is not None:
        table.add_row("unsampled", _starved(replay["never_sampled"]), _bar(replay["never_sampled"]["share"]))
    waits = [f"{name} {share:.0%}" for name, share in replay["waits"].items() if share >= 0.005]
    table.add_row("waits", ", ".join(waits) or "nobody", "")
    table.add_row("timesteps", ", ".join(f"{label}: {_number(num)}" for label, num in _by_timestep(replay)), "")
    yield table
    yield Text("─" * 40, style="dim")
    room = max(1, height - table.row_count - 4)
    yield _actors({**report, "actors": report["actors"][:room]}, wide=False, num=len(report["actors"]))


def _starved(starved: dict[str, Any]) -> str:
    """The share of states that were never sampled, and where it is greatest."""
    worst = [most_starved(starved[kind]) for kind in ("by_timestep", "by_actor")]
    most = ", ".join(f"{name} {share:.0%}" for name, share in filter(None, worst) if share >= 0.005)
    return f"{starved['share']:.0%}" + (f" (most: {most})" if most else "")


def _pace(learner: dict[str, Any]) -> str:
    """Updates a second, and the time behind and ahead; empty where there is none yet."""
    if not isinstance(learner.get("updates_per_s"), int | float):
        return ""
    parts = [f"{learner['updates_per_s']:.3g} updates/s"]
    if isinstance(learner.get("elapsed_s"), int | float):
        parts.append(f"for {_duration(learner['elapsed_s'])}, {_duration(learner['left_s'])} left")
    if isinstance(learner.get("wait_share"), int | float):
        parts.append(f"waiting {learner['wait_share']:.0%}")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _buffer(replay: dict[str, Any]) -> RenderableType:
    rows = [
        ("states", _of(replay["size"], replay["capacity"], _number), replay["size"] / max(1, replay["capacity"])),
        (
            "bytes",
            _of(replay["size_bytes"], replay["capacity_bytes"], _bytes),
            replay["size_bytes"] / max(1, replay["capacity_bytes"]),
        ),
    ]
    table = _bars(rows)
    table.add_row("inserts", f"{_number(replay['inserts_per_s'])}/s, {_number(replay['num_inserted'])} ever", "")
    table.add_row("samples", f"{_number(replay['samples_per_s'])}/s, {_number(replay['num_sampled'])} ever", "")
    refused = replay["num_refused"]
    table.add_row("refused", Text(_number(refused), style="bold red" if refused else ""), "")
    starved = replay["never_sampled"]
    if starved is not None:
        told = f"{starved['share']:.0%}, {_number(starved['live'])} of them live"
        table.add_row("unsampled", told, _bar(starved["share"]))
    return table


def _limiter(replay: dict[str, Any]) -> RenderableType:
    limiter = replay["limiter"]
    settings = limiter["settings"]
    low, high, cursor = limiter["min_cursor"], limiter["max_cursor"], limiter["cursor"]
    share = min(1.0, max(0.0, (cursor - low) / max(high - low, 1e-9)))
    rows = [(name, f"{share:.0%}", share) for name, share in replay["waits"].items() if share >= 0.005]
    table = _bars(rows or [("nobody", "waits", 0.0)])
    marker = round(share * 20)
    gauge = Text("samples wait ") + Text("─" * marker + "●" + "─" * (20 - marker)) + Text(" inserts wait")
    staleness = settings["max_staleness"]
    text = (
        f"{limiter['state']}; {settings['samples_per_insert']:g} samples per insert, from "
        f"{settings['min_size']:g} states on"
        + (f", none older than {staleness:g} updates" if staleness is not None else "")
    )
    return Group(table, gauge, Text(text, style="dim"))


def _sources(replay: dict[str, Any]) -> RenderableType:
    live, sampled, wanted = replay["share_by_source"], replay["sampled_share_by_source"], replay["wanted_share"]
    table = _grid("source", "live", "sampled", "wanted", "")
    for name in ("forward", "student", "teacher", "noise"):
        if name in live or name in sampled or wanted.get(name):
            shares = (live.get(name, 0.0), sampled.get(name), wanted.get(name))
            table.add_row(name, *(("-" if s is None else f"{s:.0%}") for s in shares), _bar(live.get(name, 0.0)))
    return table


def _ages(replay: dict[str, Any]) -> RenderableType:
    most = max((b["num"] for b in replay["ages"]), default=1)
    return _bars([(b["label"], _number(b["num"]), b["num"] / max(1, most)) for b in replay["ages"]])


def _timesteps(replay: dict[str, Any]) -> RenderableType:
    bins = _by_timestep(replay)
    most = max((num for _, num in bins), default=1)
    never = {} if replay["never_sampled"] is None else replay["never_sampled"]["by_timestep"]
    told = {label: f", {starved_share(never[label]):.0%} never sampled" if label in never else "" for label, _ in bins}
    return _bars([(label, _number(num) + told[label], num / max(1, most)) for label, num in bins])


def _by_timestep(replay: dict[str, Any]) -> list[tuple[str, int]]:
    """Live states of every timestep, or of ten ranges where there are many; noisiest first."""
    counts = {int(timestep): num for timestep, num in replay["by_timestep"].items()}
    if len(counts) <= MOST_TIMESTEPS:
        return [(str(timestep), counts[timestep]) for timestep in sorted(counts, reverse=True)]
    bins = []
    for begin in range(900, -1, -100):
        num = sum(n for timestep, n in counts.items() if begin <= max(timestep, 0) < begin + 100)
        bins.append((f"{begin}-{begin + 99}", num))
    return bins


def _learner(report: dict[str, Any]) -> RenderableType:
    learner, weights = report["learner"], report["weights"]
    table = _grid()
    table.add_row("phase", str(learner.get("phase", "not heard of")), "")
    if "update" in learner:
        total = learner.get("total_updates") or 0
        table.add_row("update", _of(learner["update"], total, _number), _bar(learner["update"] / max(1, total)))
    for field, label, form in (("loss", "loss", "{:.4g}"),):
        if isinstance(learner.get(field), int | float):
            table.add_row(label, form.format(learner[field]), "")
    if pace := _pace(learner):
        table.add_row("pace", pace, "")
    if learner.get("error"):
        table.add_row("error", Text(str(learner["error"]), style="bold red"), "")
    if weights is not None:
        have, actors = len(weights["applied_by"]), len(report["actors"])
        table.add_row("weights", f"version {weights['version']}, {_bytes(weights['size_bytes'])}", "")
        table.add_row("applied", f"by {have} of {actors} actors", _bar(have / max(1, actors)))
    return table


def _actors(report: dict[str, Any], *, wide: bool, num: int | None = None) -> RenderableType:
    """num: of all actors, where `report` has only those that there is room for."""
    actors = report["actors"]
    num = len(actors) if num is None else num
    names = ["actor", "state", "states/s", "waits", "version", *(["behind", "unsampled", "heard"] if wide else [])]
    table = _grid(*names)
    for actor in actors[:MOST_ACTORS]:
        style = {"failed": "red", "silent": "yellow", "loading": "dim"}.get(actor["state"], "")
        waiting = "-" if actor["waiting_share"] is None else f"{actor['waiting_share']:.0%}"
        row = [
            actor["name"],
            actor["state"],
            "-" if actor["states_per_s"] is None else _number(actor["states_per_s"]),
            waiting,
            "-" if actor["version"] is None else str(actor["version"]),
        ]
        if wide:
            behind = actor["versions_behind"]
            starved = actor["never_sampled"]
            row += ["-" if behind is None else f"{behind} updates", "-" if starved is None else f"{starved:.0%}"]
            row += [f"{actor['beat_age_s']:.0f} s ago"]
        table.add_row(*row, style=style)
    more = num - min(len(actors), MOST_ACTORS)
    count = Text(f"{num} heard, {report['wanted_actors']} wanted", style="dim")
    if more > 0:
        count.append(f"; {more} more are not shown")
    if report["autoscale"] is not None:
        count.append("; autoscaled from {} to {}".format(*report["autoscale"]))
    for key, words in FLEET_WORDS.items():
        if report["fleet"].get(key):
            count.append(f"; {report['fleet'][key]} {words}", style="yellow")
    failures = [Text(f"{a['name']}: {a['failed']}", style="red") for a in actors if a["failed"]][:3]
    return Group(table, count, *failures)


def _grid(*names: str) -> Table:
    table = Table(box=None, show_header=bool(names), header_style="dim", padding=(0, 1), pad_edge=False)
    for number, name in enumerate(names or ("", "", "")):
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=7 if number < 2 else None)
    return table


def _bars(rows: Iterable[tuple[str, str, float]]) -> Table:
    table = _grid()
    for label, text, share in rows:
        table.add_row(label, text, _bar(share))
    return table


def _bar(share: float, width: int = 16) -> Text:
    """A bar of `share` (0..1) of `width` columns, to an eighth of a column; the smallest is still seen."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    whole, rest = divmod(eighths, 8)
    return Text("█" * whole + (BLOCKS[rest - 1] if rest else ""), style="cyan")


def _of(some: float, whole: float, form: Any) -> str:
    return f"{form(some)} of {form(whole)}"


def _number(value: float) -> str:
    """1234567 as 1.23M; three digits are enough to watch."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1024
    return f"{value:.3g} TiB"
