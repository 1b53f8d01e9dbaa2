"""What the run's supervisor makes of how its learner ended."""

from __future__ import annotations

import pytest

from ddil_dist.errors import DdilError
from ddil_dist.launch.supervisor import has_finished
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
