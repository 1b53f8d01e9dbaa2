"""Every registered method keeps the contract: losses, gradients, workers, resume, export."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddil_dist.methods import METHODS
from ddil_dist.methods.registry import name_of
from ddil_dist.problem import ImitationProblem
from tests.methods.contract import check_export, check_losses, check_resume, check_rows_are_independent
from tests.support.problem import tiny_problem

FORWARD = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
HALF = "prior.parts=[{until: 1, forward: 0.5, student: 0.5, teacher: 0}]"
EXAMPLES: dict[str, tuple[str, ...]] = {
    "progressive": (),
    "velocity": ("student.steps=8",),
    "guidance": ("student.steps=8",),
    "consistency": (HALF, "objective.solver_steps=10", "objective.sampler_steps=[2, 4]"),
    "trajectory_consistency": (HALF, "objective.solver_steps=10", "objective.sampler_steps=[2, 4]"),
    "distribution_matching": (
        "rollout.labels=learner", "student.spacing=trailing", "objective.generator_input=prior",
        "objective.generator_every=2",
    ),
    "dmd": ("student.steps=1",),
    "ladd": ("rollout.labels=learner", "student.spacing=trailing"),
    "ufogen": ("rollout.labels=learner", "student.spacing=trailing", FORWARD),
}  # fmt: skip
"""A configuration of each, on the tiny pipeline."""


@pytest.fixture(scope="module", params=[name_of(method) for method in METHODS])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def problem(method: str, tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory, f"objective.type={method}", *EXAMPLES[method])


def test_its_losses_train_their_own_networks(problem: ImitationProblem) -> None:
    check_losses(problem)


def test_two_workers_are_one(problem: ImitationProblem) -> None:
    check_rows_are_independent(problem)


def test_its_exported_pipeline_is_its_policy(problem: ImitationProblem, tmp_path: Path) -> None:
    check_export(problem, tmp_path / "student")


def test_a_stopped_run_of_it_ends_where_it_would_have_ended(method: str, tiny_overrides: list[str]) -> None:
    check_resume([*tiny_overrides, f"objective.type={method}", *EXAMPLES[method]])
