"""What the run's supervisor makes of how its learner ended."""

from __future__ import annotations

from typing import Any

import pytest

from ddil_dist.errors import DdilError
from ddil_dist.launch.supervisor import _progress, has_finished
from learner.worker import Outcome


@pytest.mark.parametrize("phase", ["finished", "stopped"])
def test_only_a_learner_at_its_last_update_has_finished(phase: str) -> None:
    assert has_finished(Outcome(phase), failure=None, error=None) is (phase == "finished")


@pytest.mark.parametrize(
    ("outcome", "failure", "error", "told"),
    [
        (Outcome("failed", "no room"), None, None, "the learner failed: no room"),
        (None, "no room", None, "the learner failed: no room"),
        (Outcome("stopped"), "no room", None, "the learner failed: no room"),  # of another worker
        (None, None, RuntimeError("Ray Train gave up"), "the learner failed: Ray Train gave up"),
        (None, None, None, "ended without a word"),
    ],
)
def test_a_learner_that_failed_is_not_called_stopped(
    outcome: Outcome | None, failure: str | None, error: BaseException | None, told: str
) -> None:
    with pytest.raises(DdilError, match=told):
        has_finished(outcome, failure=failure, error=error)


class Control:
    """The learner's status alone."""

    def __init__(self, **status: Any) -> None:
        self._status = status

    def learner_status(self) -> dict[str, Any]:
        return self._status


@pytest.mark.parametrize(
    ("now", "gets_on"),
    [
        ({"update": 7, "checkpoint": {"update": 7, "written_bytes": 50, "total_bytes": 90}}, False),
        ({"update": 8, "checkpoint": {"update": 7, "written_bytes": 50, "total_bytes": 90}}, True),
        ({"update": 7, "checkpoint": {"update": 7, "written_bytes": 60, "total_bytes": 90}}, True),
    ],
)
def test_a_learner_that_stops_gets_on_by_an_update_or_a_piece_of_its_checkpoint(
    now: dict[str, Any], gets_on: bool
) -> None:
    status = {"update": 7, "checkpoint": {"update": 7, "written_bytes": 50, "total_bytes": 90}}
    before, after = (_progress(Control(**news), 0, 0, {}) for news in (status, now))  # type: ignore[arg-type]
    assert after.is_past(before) is gets_on
