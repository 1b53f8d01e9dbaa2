"""The learning-rate schedule, value by value, and AdamW as configured."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ddil_dist.config import OptimizerConfig, PriorConfig
from ddil_dist.errors import ConfigError
from learner.optimization import create_optimizer, learning_rate, learning_rate_factor


def factors(updates: int, **config: Any) -> list[float]:
    return [learning_rate_factor(OptimizerConfig(**config), update, updates=updates) for update in range(updates)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert factors(6, schedule="constant", warmup_updates=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_falls_evenly_to_the_end() -> None:
    assert factors(6, schedule="linear", warmup_updates=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_decay_is_half_a_cosine() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert factors(4, schedule="cosine", warmup_updates=0) == pytest.approx(expected)


def test_at_a_restart_warm_up_and_decay_begin_anew_over_a_span_of_their_own() -> None:
    wanted = [0.5, 1, 1, 0.75, 0.5, 0.25, 0.5, 1, 1, 0.5]  # of 6 updates, and of 4
    assert factors(10, schedule="linear", warmup_updates=2, restarts=(0.6,)) == pytest.approx(wanted)
    cosine = [1, 0.5, 1, 0.75, 0.25, 1, 0.8535534, 0.5, 0.1464466]
    restarts = (2 / 9, 5 / 9)
    assert factors(9, schedule="cosine", warmup_updates=0, restarts=restarts) == pytest.approx(cosine)
    # Spans that are shorter than the warm-up, or empty.
    assert factors(4, schedule="constant", warmup_updates=3, restarts=(0.4, 0.5)) == pytest.approx([0.5, 1, 0.5, 1])
    assert factors(2, schedule="linear", warmup_updates=0, restarts=(0.5, 0.9)) == [1, 1]


def test_a_restart_falls_on_the_first_update_of_a_part_of_the_prior() -> None:
    for share in (0.1, 0.3, 0.571428, 0.6, 0.7, 0.9):
        prior = PriorConfig.model_validate(
            {
                "parts": [
                    {"until": share, "forward": 1, "student": 0, "teacher": 0},
                    {"until": 1, "forward": 0, "student": 1, "teacher": 0},
                ]
            }
        )
        for updates in (10, 13, 30, 100):
            begun = next(update for update in range(updates) if prior.at(update / updates).student == 1)
            values = factors(updates, schedule="linear", warmup_updates=0, restarts=(share,))
            assert [update for update, value in enumerate(values) if value == 1] == [0, begun]


@pytest.mark.parametrize("restarts", [(0.5, 0.5), (0.6, 0.3), (0.0,), (1.0,)])
def test_restarts_rise_within_the_run(restarts: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="restarts"):
        OptimizerConfig(restarts=restarts)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 50])
def test_every_factor_is_a_share_and_no_update_is_wasted(schedule: str, warmup: int) -> None:
    for updates in (1, 2, 5, 20):
        values = factors(updates, schedule=schedule, warmup_updates=warmup)
        assert all(0 < value <= 1 for value in values)
        assert max(values) == 1.0


def test_the_optimizer_is_as_configured() -> None:
    config = OptimizerConfig(learning_rate=0.2, betas=(0.8, 0.9), weight_decay=0.3, warmup_updates=2)
    optimizer = create_optimizer([torch.nn.Parameter(torch.ones(3))], config)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["weight_decay"] == 0.3
    rates = [learning_rate(config, update, updates=4) for update in range(4)]
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.1])


def test_the_fused_optimizer_makes_the_same_steps() -> None:
    made = []
    for kind in ("adamw", "adamw_fused"):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = create_optimizer([parameter], OptimizerConfig(type=kind, learning_rate=0.1, weight_decay=0.2))
        for _ in range(5):
            optimizer.zero_grad()
            (parameter**2).sum().backward()
            optimizer.step()
        made.append(parameter.detach())
    torch.testing.assert_close(made[0], made[1])
    assert optimizer.defaults["fused"] is True


def test_eight_bits_without_the_package_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"learner\.optimizer\.type: 'adamw_8bit' needs the package bitsandbytes"):
        create_optimizer([torch.nn.Parameter(torch.ones(3))], OptimizerConfig(type="adamw_8bit"))
