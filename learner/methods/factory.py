"""The configured method's networks and objective, from the module of its losses."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import cast

from torch import nn

from ddil_dist.config import RunConfig
from ddil_dist.methods import Method
from ddil_dist.problem import ImitationProblem
from learner.methods.base import STUDENT, Losses, Objective


def losses_of(method: Method) -> Losses:
    """The learner's side of a method: a module."""
    return cast(Losses, importlib.import_module(method.losses))


def create_networks(config: RunConfig, problem: ImitationProblem) -> dict[str, nn.Module]:
    """The networks of every role before training, on the problem's device."""
    networks = {STUDENT: problem.new_student()}
    if config.objective.roles:
        networks |= losses_of(config.objective).create_roles(config, problem)
    assert set(networks) == {STUDENT, *config.objective.roles}, "a method's roles are those that it creates"
    return networks


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int = 0
) -> Objective:
    """The objective over `networks` (of `create_networks`, prepared for training); seed: this worker's, of its data."""
    return losses_of(config.objective).create_objective(config, problem, networks, seed=seed)
