"""What every method's losses are: phases of an update, each a loss of a batch that one role's network is trained on.

An objective is bound to its networks by role when it is made: always "student", and what it needs besides, such as
"fake_score". It calls them as modules (through `Denoiser` or by itself), never a part of one from outside: under data
parallelism a gradient is only averaged over workers if the network's own `forward` made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from torch import Tensor, nn

from ddil_dist.config import RunConfig
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States

STUDENT: Final = "student"
"""The role whose network is published, averaged and exported."""


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """A loss at a batch.

    loss         scalar with a graph: a mean over the batch's rows, so that micro-batches and workers may share them.
    per_sample   [B] float32 without a graph.
    metrics      further scalars by name, without a graph: means over the rows, too.
    """

    loss: Tensor
    per_sample: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Phase:
    """One optimizer step of `role` on the update's batch. Only that role's parameters require gradients in `loss`."""

    role: str
    loss: Callable[[States[Tensor]], ObjectiveOutput]


class Objective(Protocol):
    """What an update consists of. Updates are counted from 0; all workers see the same counts."""

    def phases(self, update: int) -> Sequence[Phase]:
        """The phases of this update, in order, each role at most once; all of them get the same batch."""

    def retry(self, update: int) -> None:
        """A phase of this update is made anew, in other micro-batches: what its failed attempt left must go."""

    def after_update(self, update: int) -> None:
        """The phases of this update are done: such as moving an averaged target."""

    @property
    def state(self) -> Mapping[str, nn.Module]:
        """Further networks to be checkpointed, by name."""


class Losses(Protocol):
    """The module that `Method.losses` names: the learner's side of a method."""

    def create_objective(
        self, config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int
    ) -> Objective:
        """Bind the losses to the networks by role, prepared for training; seed: this worker's, of data of its own."""

    def create_roles(self, config: RunConfig, problem: ImitationProblem) -> dict[str, nn.Module]:
        """The networks of `Method.roles` before training, on the problem's device; only asked for where there are."""


class StudentObjective:
    """Base of an objective that trains the student alone, by one loss; a subclass is that loss."""

    def phases(self, update: int) -> Sequence[Phase]:
        """Every update is one step of the student."""
        return (Phase(STUDENT, self.loss),)

    def retry(self, update: int) -> None:
        """Nothing: a loss leaves nothing behind."""

    def after_update(self, update: int) -> None:
        """Nothing."""

    @property
    def state(self) -> Mapping[str, nn.Module]:
        """Nothing beside the student."""
        return {}

    def loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's, at a batch of states."""
        raise NotImplementedError
