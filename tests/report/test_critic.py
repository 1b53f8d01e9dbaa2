"""The critic's section: there where a critic was trained, and its lag as it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddil_dist.report import write_report
from ddil_dist.report.critic import critic_lag
from tests.report.test_page import Outline

EVERY = 5


def lines(num: int, *, lag: float, critic: str = "every", noise: float = 0.05) -> list[dict[str, Any]]:
    """Update lines of a run whose critic's loss is (1 + lag) times too high after a move, then falls back evenly."""
    rng = np.random.default_rng(0)
    made: list[dict[str, Any]] = []
    for update in range(1, num + 1):
        turn = (update - 1) % EVERY  # 0: the generator's
        last = EVERY if critic == "every" else EVERY - 1  # in the update of its turn it learns from what was before
        behind = (last - turn) / (last - 1) if turn else 0.0
        loss = 0.2 * (1 + lag) ** behind * float(np.exp(noise * rng.standard_normal()))
        losses, metrics = {}, {}
        if turn == 0:
            losses["student"], metrics["student/gradient"] = 1.0, 0.3
        if turn or critic == "every":
            losses["fake_score"] = loss + 0.1
            metrics |= {"fake_score/denoising": loss, "fake_score/accuracy": 0.6, "fake_score/gan": 1.3}
        made.append({"kind": "update", "update": update, "loss": 1.0, "losses": losses, "metrics": metrics})
    return made


@pytest.mark.parametrize("critic", ["every", "others"])
@pytest.mark.parametrize("lag", [0.0, 0.4])
def test_the_lag_is_that_of_the_losses(lag: float, critic: str) -> None:
    found = critic_lag(lines(1000, lag=lag, critic=critic))
    assert found is not None
    assert found.num_turns in (99, 100)
    assert abs(np.log1p(found.lag) - np.log1p(lag)) < 4 * found.error
    assert 0.003 < found.error < 0.02


def test_without_turns_of_its_own_there_is_no_lag() -> None:
    every_update = [line | {"losses": {"student": 1.0, "fake_score": 0.2}} for line in lines(200, lag=0.2)]
    assert critic_lag(every_update) is None
    assert critic_lag(lines(30, lag=0.2)) is None
    assert critic_lag([]) is None


@pytest.mark.parametrize(("lag", "told"), [(0.0, "no worse"), (0.4, "higher")])
def test_the_page_tells_it(tmp_path: Path, lag: float, told: str) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines(600, lag=lag))
    (tmp_path / "metrics.jsonl").write_text(text)
    outline = Outline(write_report(tmp_path).read_text(encoding="utf-8"))
    assert told in outline.text
    assert "Told from data" in outline.text
    assert outline.ids["critic"] == 1
