"""The analysis in plain words: is there covariate shift, where, and would DDIL help. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from ddil_dist.analysis.results import PointShift, ShiftResult

MATTERS: Final = 1.1
"""A ratio that surely is no higher is called no shift: training at these states could win a tenth of the error."""
SURE: Final = 0.01
"""The largest p at which states are said to be of another distribution."""

Answer = Literal["shift", "none", "unsure"]


@dataclass(frozen=True)
class Verdict:
    """The answer, and sentences that say it and what it rests on."""

    answer: Answer
    sentences: tuple[str, ...]

    @property
    def headline(self) -> str:
        return self.sentences[0]


def verdict(shift: ShiftResult, *, num_states: int) -> Verdict:
    """num_states: trajectories that every error is the mean over."""
    overall = shift.overall
    if overall is None:
        return Verdict(
            "none",
            (
                "A student of one step has no shift: its only state is noise, which nobody makes.",
                "DDIL has nothing to add to plain distillation at one step.",
            ),
        )
    facts = (_where(shift), _distance(shift), _compounding(shift), _basis(num_states))
    measured = f"{overall.value:.2f} times (95% interval {overall.low:.2f} to {overall.high:.2f})"
    if overall.low > 1:
        answer: Answer = "shift"
        head = (
            f"There is covariate shift: at the states that it reaches, the student errs {measured} as much as at "
            "forward-diffused ones.",
            "DDIL trains it on such states: it may help here, which a run with it and one without would show."
            if overall.high > MATTERS
            else "It is small; DDIL could win no more than a tenth of the error.",
        )
    elif overall.high < MATTERS:
        answer = "none"
        head = (
            f"There is no covariate shift that matters: at the states that it reaches, the student errs {measured} as "
            "much as at forward-diffused ones.",
            "Plain distillation on forward-diffused data is enough here; DDIL has no such error to repair.",
        )
    else:
        answer = "unsure"
        gap = max(abs(overall.value - 1), (MATTERS - 1) / 2)
        needed = math.ceil(num_states * max(2.0, (overall.half_width / gap) ** 2))
        head = (
            f"This cannot tell whether there is covariate shift: at the states that it reaches, the student errs "
            f"{measured} as much as at forward-diffused ones.",
            f"Some {needed} states or more would be needed (--states).",
        )
    return Verdict(answer, head + tuple(fact for fact in facts if fact))


def _where(shift: ShiftResult) -> str:
    surely = [point for point in shift.points[1:] if point.ratio.low > 1]
    if not surely:
        return "At no single timestep is the error at reached states surely the higher one."
    worst = max(surely, key=lambda point: point.ratio.value)
    places = ", ".join(str(point.timestep) for point in surely)
    return f"Surely higher at t = {places}; most at t = {worst.timestep}: {worst.ratio.show()} times."


def _distance(shift: ShiftResult) -> str:
    apart = [point for point in shift.points[1:] if point.p_visited <= SURE]
    if not apart:
        return "The states that it reaches cannot be told from forward-diffused ones by the teacher's features."
    places = ", ".join(str(point.timestep) for point in apart)
    so_is_the_teacher = all(point.p_teacher <= SURE for point in apart)
    told = f"The states that it reaches are not distributed as forward-diffused ones at t = {places}"
    if not so_is_the_teacher:
        return f"{told}; the teacher's are not told apart at all of these."
    more = sum(_excess(point) > 0 for point in apart)
    return f"{told}; nor are the guided teacher's there, and the student's lie further away at {more} of {len(apart)}."


def _excess(point: PointShift) -> float:
    return point.distance_visited - point.distance_teacher


def _compounding(shift: ShiftResult) -> str:
    share = shift.compounded
    if share is None:
        return ""
    return (
        f"With the teacher's state put in before the last step, {share:.0%} of the final error is gone: so much was "
        "made on the way there."
        if share > 0
        else "With the teacher's state put in before the last step the final error is no smaller: none of it compounds."
    )


def _basis(num_states: int) -> str:
    return (
        f"This rests on {num_states} trajectories, each error against what the teacher does from the same state; it "
        "says where the student errs, not what people would see."
    )
