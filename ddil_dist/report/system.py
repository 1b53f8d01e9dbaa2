"""How the machinery ran: replay, weights on their way to the actors, throughput, where the time went."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from ddil_dist.report.charts import (
    COLOURS,
    SOURCE_COLOURS,
    SOURCE_LABELS,
    Chart,
    figure,
    line,
    stacked_bands,
    stacked_sources,
    x_label,
)
from ddil_dist.report.html import (
    Colour,
    Html,
    count,
    duration,
    el,
    lead,
    missing,
    percent,
    plural,
    section,
    size,
    stacked_bar,
)
from ddil_dist.report.record import Line, RunRecord
from ddil_dist.report.series import (
    SOURCES,
    ActiveClock,
    Floats,
    bands,
    column,
    covering,
    number,
    picked,
    publish_delays,
    rates,
    shares,
    thinned,
    total,
)
from ddil_dist.report.starved import starved_charts, starved_sentence

MAX_ACTOR_BARS = 12
"""Actors with a bar of their own; more are pooled into one bar."""
MAX_DOTS = 500
"""Delays drawn; of more, every n-th."""


def time_axis(clock: ActiveClock, times: Floats) -> tuple[Floats, str]:
    """Active time of unix `times` in the unit that suits the run's length, and that unit."""
    unit, name = (60.0, "minutes") if clock.seconds < 3 * 3600 else (3600.0, "hours")
    return clock(times) / unit, name


def replay_section(run: RunRecord, clock: ActiveClock) -> Html:
    """What the replay buffer held, by source and by policy version, and its traffic."""
    lines = picked(run.of("replay"), limit=240)
    if not lines:
        return section("replay", "Replay", missing("No replay lines in the journal yet."))
    x, unit = time_axis(clock, column(lines, "time"))
    live = shares(lines, "by_source", x, SOURCES)
    charts = []
    if live.values.any():

        def draw_sources(axes: Axes) -> None:
            stacked_sources(axes, live)
            x_label(axes, unit)

        keys = [(SOURCE_LABELS[name], SOURCE_COLOURS[name]) for name in SOURCES]
        charts.append(Chart("Live states by source", draw_sources, "share", keys, wide=False, height=250))
    charts += _version_charts(lines, x, unit)
    charts += [_traffic_chart(lines, x, unit)]
    last = lines[-1]
    inserted, sampled = number(last.get("num_inserted")), number(last.get("num_sampled"))
    ratio = f"{sampled / inserted:.2f}" if inserted > 0 else "no"
    wanted = f" (the limiter aims at {run.config.replay.samples_per_insert:g})" if run.config is not None else ""
    sentence = lead(
        el("b", plural(round(_finite(last.get("size"))), "state")),
        f" ({size(_finite(last.get('size_bytes')))}) were live at the end; every inserted state was sampled ",
        el("b", f"{ratio} times"),
        f" on average{wanted}.",
    )
    charts += starved_charts(last)
    drawn = el("div", *[figure(chart) for chart in charts], class_="grid")
    return section("replay", "Replay", sentence, *starved_sentence(last), drawn)


def _finite(value: object) -> float:
    known = number(value)
    return known if np.isfinite(known) else 0.0


def _version_charts(lines: Sequence[Line], x: Floats, unit: str) -> list[Chart]:
    """Live states by policy version, oldest versions below."""
    versions = {int(v) for entry in lines for v in entry.get("by_version") or {} if int(v) >= 0}
    parts = bands(sorted(versions))
    if not parts:
        return []
    values = np.zeros((len(parts), len(lines)))
    for index, entry in enumerate(lines):
        for version, num in (entry.get("by_version") or {}).items():
            if int(version) >= 0:
                values[covering(parts, int(version)), index] += _finite(num)

    def draw(axes: Axes) -> None:
        stacked_bands(axes, x, values)
        axes.yaxis.set_major_formatter(lambda value, _: count(value))
        x_label(axes, unit)

    note = f"pale {parts[0][0]} to strong {parts[-1][-1]}"
    keys: list[tuple[str, Colour]] = [("states a student had a hand in", "student")]
    return [Chart("Live states by policy version", draw, note, keys, wide=False, height=250)]


def _traffic_chart(lines: Sequence[Line], x: Floats, unit: str) -> Chart:
    def draw(axes: Axes) -> None:
        for key, colour in (("num_sampled", "teacher"), ("num_inserted", "student"), ("size", "accent")):
            line(axes, *thinned(x, column(lines, key)), colour)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: count(value))
        x_label(axes, unit)

    keys: list[tuple[str, Colour]] = [("sampled", "teacher"), ("inserted", "student"), ("live", "accent")]
    return Chart("Traffic", draw, "states in all since the start, and live", keys, height=250)


def weights_section(run: RunRecord) -> Html:
    """How soon a published student was used by the actors."""
    published, applied = run.of("publish"), run.of("applied")
    if not published:
        return section("weights", "Weights", missing("No publish lines in the journal yet."))
    delays = publish_delays(published, applied)
    sizes, costs = column(published, "size_bytes"), column(published, "seconds")
    facts = [
        ("versions published", count(len(published))),
        ("size of one", size(float(np.nanmax(sizes))) if np.isfinite(sizes).any() else "unknown"),
        ("publishing took", duration(float(np.nanmedian(costs))) if np.isfinite(costs).any() else "unknown"),
    ]
    if not delays:
        return section("weights", "Weights", _facts(facts), missing("No actor has applied a published version yet."))
    waits = np.array([delay.seconds for delay in delays])
    facts.append(("9 of 10 actors had it within", duration(float(np.quantile(waits, 0.9)))))

    def draw(axes: Axes) -> None:
        shown = delays[:: 1 + len(delays) // MAX_DOTS]
        versions, seconds = [delay.version for delay in shown], [delay.seconds for delay in shown]
        axes.scatter(versions, seconds, s=26, color=COLOURS["teacher"], alpha=0.7, linewidths=0)
        axes.set_ylim(bottom=0)
        x_label(axes, "student version")

    sentence = lead(
        "An actor ran a new student ", el("b", duration(float(np.median(waits)))), " after its publication (median)."
    )
    note = "seconds, one dot an actor and version"
    chart = figure(Chart("From published to applied", draw, note, height=230))
    return section("weights", "Weights on their way", sentence, _facts(facts), chart)


def _facts(pairs: Sequence[tuple[str, str]]) -> Html:
    return el("dl", *[el("div", el("dt", key), el("dd", value)) for key, value in pairs], class_="facts")


MEMORY = tuple(f"{part}_bytes" for part in ("weights", "gradients", "optimizer", "average", "activations"))
"""The parts of a memory estimate."""


def throughput_section(run: RunRecord, clock: ActiveClock) -> Html:
    """Updates and states a second over the active time."""
    updates, rollouts = run.updates, run.of("rollout")
    if len(updates) < 2 and len(rollouts) < 2:
        return section("throughput", "Throughput", missing("Too few lines in the journal yet for a rate."))
    drawn = np.array([sum(_finite(v) for v in (entry.get("sources") or {}).values()) for entry in updates])
    actors = len({entry.get("actor") for entry in rollouts}) or 1
    update_bins = int(np.clip(len(updates) / 8, 2, 60))
    rollout_bins = int(np.clip(len(rollouts) / actors / 2, 2, 60))
    update_times, rollout_times = column(updates, "time"), column(rollouts, "time")
    charts = [
        *_rate_chart("Student updates", "a second", clock, update_times, np.ones(len(updates)), update_bins, "accent"),
        *_rate_chart("States drawn by the learner", "a second", clock, update_times, drawn, update_bins, "teacher"),
        *_rate_chart(
            "States visited by the actors", "a second", clock, rollout_times, column(rollouts, "states"), rollout_bins,
            "student",
        ),
        *_fill_chart(rollouts, clock),
    ]  # fmt: skip
    pauses = len(clock.pauses)
    paused = f" {pauses} pause{'s are' if pauses > 1 else ' is'} left out of the time axis." if pauses else ""
    calls = total(rollouts, "teacher_calls"), total(rollouts, "student_calls")
    told = f"The actors called the teacher {count(calls[0])} and the student {count(calls[1])} times.{paused}"
    sentences = [*([told] if sum(calls) else []), *_memory(run)]
    figures = el("div", *[figure(chart) for chart in charts], class_="grid")
    return section("throughput", "Throughput", lead(" ".join(sentences)) if sentences else Html(""), figures)


def _memory(run: RunRecord) -> list[str]:
    """What an update was estimated to need, and where that was too much after all, a sentence each."""
    estimates, smaller = run.of("memory")[-1:], run.of("micro_batch")[-1:]
    needed = [
        f"An update was estimated to need {size(sum(number(line.get(key)) for key in MEMORY))} of a worker's memory."
        for line in estimates
        if all(np.isfinite(number(line.get(key))) for key in MEMORY)
    ]
    fell = [
        f"At update {line.get('update')} it ran out, and went on with {line.get('rows')} rows a backward pass."
        for line in smaller
    ]
    return needed + fell


def _rate_chart(
    title: str, note: str, clock: ActiveClock, times: Floats, amounts: Floats, bins: int, colour: Colour
) -> list[Chart]:
    known = np.isfinite(times)
    middles, values = rates(clock(times[known]), amounts[known], bins=bins)
    if not values.any():
        return []
    unit, name = (60.0, "minutes") if clock.seconds < 3 * 3600 else (3600.0, "hours")

    def draw(axes: Axes) -> None:
        axes.fill_between(middles / unit, 0, values, color=COLOURS[colour], alpha=0.15, linewidth=0)
        line(axes, middles / unit, values, colour)
        axes.set_ylim(bottom=0)
        x_label(axes, name)

    return [Chart(title, draw, note, wide=False, height=230)]


def _fill_chart(rollouts: Sequence[Line], clock: ActiveClock) -> list[Chart]:
    fill = column(rollouts, "batch_fill")
    if not np.isfinite(fill).any():
        return []
    x, unit = time_axis(clock, column(rollouts, "time"))

    def draw(axes: Axes) -> None:
        axes.scatter(*thinned(x, fill), s=12, color=COLOURS["student"], alpha=0.6, linewidths=0)
        axes.set_ylim(0, 1.05)
        axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        x_label(axes, unit)

    return [Chart("Batch fill of the actors", draw, "share in use", wide=False, height=230)]


def time_section(run: RunRecord) -> Html:
    """Bars of where learner, actors and the whole run spent their time."""
    bars = [bar for bar in (_phase_bar(run), _learner_bar(run)) if bar is not None] + _actor_bars(run)
    if not bars:
        return section("time", "Where the time went", missing("No timings in the journal yet."))
    sentences = []
    update_s = total(run.updates, "update_s")
    if update_s > 0:
        waited = total(run.updates, "wait_s") / update_s
        sentences = [lead("The learner waited for states during ", el("b", percent(waited)), " of its time.")]
    return section("time", "Where the time went", *sentences, el("div", *bars, class_="bars"))


def _phase_bar(run: RunRecord) -> Html | None:
    seconds: dict[str, float] = {}
    for entry in run.of("phase"):
        name = str(entry.get("name", "?"))
        seconds[name] = seconds.get(name, 0.0) + max(0.0, _finite(entry.get("seconds")))
    if not any(seconds.values()):
        return None
    colours: tuple[Colour, ...] = ("forward", "accent", "teacher", "student", "warn", "other")
    parts = [(name, value, colours[index % len(colours)]) for index, (name, value) in enumerate(seconds.items())]
    return stacked_bar("The run", duration(sum(seconds.values())), parts)


def _learner_bar(run: RunRecord) -> Html | None:
    parts: list[tuple[str, float, Colour]] = [
        ("waiting for states", total(run.updates, "wait_s"), "warn"),
        ("labels", total(run.updates, "label_s"), "teacher"),
        ("training", total(run.updates, "compute_s"), "accent"),
    ]
    return _bar("Learner", total(run.updates, "update_s"), parts)


def _actor_bars(run: RunRecord) -> list[Html]:
    by_actor: dict[str, list[Line]] = {}
    for entry in run.of("rollout"):
        by_actor.setdefault(str(entry.get("actor", "?")), []).append(entry)
    groups = sorted(by_actor.items())
    if len(groups) > MAX_ACTOR_BARS:
        groups = [(f"{len(groups)} actors together", [entry for _, lines in groups for entry in lines])]
    bars = []
    for name, lines in groups:
        label = name if name.endswith("together") or name.startswith("actor") else f"Actor {name}"
        parts: list[tuple[str, float, Colour]] = [
            ("network", total(lines, "network_s"), "accent"),
            ("waiting to insert", total(lines, "insert_wait_s"), "warn"),
        ]
        bars.append(_bar(label, total(lines, "tick_s"), parts))
    return [bar for bar in bars if bar is not None]


def _bar(label: str, whole: float, parts: list[tuple[str, float, Colour]]) -> Html | None:
    """A bar of the parts and of what they leave of the whole."""
    named = sum(amount for _, amount, _ in parts)
    if max(whole, named) <= 0:
        return None
    rest: tuple[str, float, Colour] = ("other", max(0.0, whole - named), "other")
    return stacked_bar(label, duration(max(whole, named)), [*parts, rest])
