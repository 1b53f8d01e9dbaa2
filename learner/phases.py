"""One phase of an update: its loss's gradient in micro-batches that fit the device's memory, checked, and a step."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import Tensor

from ddil_dist.errors import DivergenceError, EnvironmentFailure
from ddil_dist.journal import Journal
from ddil_dist.states import States
from learner.checkpoint import CheckpointStore
from learner.methods import Objective, ObjectiveOutput, Phase
from learner.roles import Role, in_training

CAREFUL_UPDATES = 2
"""Steps of every role and start: after the first its optimizer has its state, and the second finds out if it fits."""

LEAST_LOSS_SCALE = 2.0**-8
"""Of a float16 run: where gradients still overflow under it, they will under any."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What a phase did, over all workers. per_sample: [B] on the CPU, worker by worker."""

    loss: float
    per_sample: Tensor
    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float


class PhaseRunner:
    """Runs the phases of an objective over its roles.

    rows: of a micro-batch, at most; halved, for good, where the device has no memory for so many.
    """

    def __init__(
        self,
        objective: Objective,
        roles: Mapping[str, Role],
        *,
        rows: int,
        accelerator: Accelerator,
        checkpoints: CheckpointStore,
        journal: Journal | None,
    ) -> None:
        self._objective = objective
        self._roles = roles
        self._rows = rows
        self._accelerator = accelerator
        self._checkpoints = checkpoints
        self._journal = journal
        self._steps_made = dict.fromkeys(roles, 0)
        self._update = 0

    def run(self, phase: Phase, batch: States[Tensor], *, update: int) -> Step:
        """One optimizer step of a role. Raises DivergenceError, EnvironmentFailure."""
        self._update = update
        role = self._roles[phase.role]
        with in_training(self._roles, phase.role, self._accelerator):
            outputs = self._backward_within_memory(phase, batch)
        norm = role.clip()
        step = self._outcome(role, outputs, norm)
        self._check(role, step)
        role.step(self._update)
        self._steps_made[role.name] += 1
        return step

    def _backward_within_memory(self, phase: Phase, batch: States[Tensor]) -> list[tuple[ObjectiveOutput, float]]:
        """The phase's gradient; where the device's memory is too small for it, in smaller micro-batches from now on.

        Workers must halve theirs together, and none may wait in a collective operation for one that has failed. So
        in a role's first steps of a start each makes its gradient alone, all agree, and only then it is averaged. Later
        nothing new is allocated, and a worker among several that fails all the same ends the run.
        """
        role, accelerator = self._roles[phase.role], self._accelerator
        careful = self._steps_made[role.name] < CAREFUL_UPDATES
        apart = careful and accelerator.num_processes > 1 and not accelerator.is_fsdp2
        while True:
            outputs, problem = self._try_backward(phase, batch, synchronize=not apart)
            failed = problem is not None
            if apart:
                failed = bool(gathered(self._accelerator, torch.tensor([failed])).any())
            if not failed:
                break
            rows = min(self._rows, len(batch))
            if rows == 1 or (accelerator.num_processes > 1 and not apart):
                raise EnvironmentFailure(
                    f"update {self._update}: the device has too little memory for a backward pass of {rows} rows of "
                    f"the {role.name} ({problem}); set learner.micro_batch_size lower or "
                    "learner.gradient_checkpointing=true, and run again to resume"
                )
            self._rows = (rows + 1) // 2
            role.drop_gradient()
            self._objective.retry(self._update)
            gc.collect()  # what the failed attempt left lies in cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning(
                "update %d: out of memory with %d rows a backward pass of the %s; from now on %d rows, accumulated to "
                "the same batch of %d",
                *(self._update, rows, role.name, self._rows, len(batch)),
            )
            if self._journal is not None:
                self._journal.write("micro_batch", update=self._update, rows=self._rows)
        if apart:
            role.average_gradient()
        return outputs

    def _try_backward(
        self, phase: Phase, batch: States[Tensor], *, synchronize: bool
    ) -> tuple[list[tuple[ObjectiveOutput, float]], str | None]:
        """The phase's outputs, or why there was no memory for them; of a failed attempt nothing is kept alive."""
        alone = nullcontext() if synchronize else self._accelerator.no_sync(self._roles[phase.role].network)
        try:
            with alone:
                return self._backward(phase, batch), None
        except torch.OutOfMemoryError as error:
            return [], str(error).splitlines()[0]

    def _backward(self, phase: Phase, batch: States[Tensor]) -> list[tuple[ObjectiveOutput, float]]:
        """Accumulate a phase's gradient over the batch's micro-batches; what each gave, and its share of the batch.

        Mixed precision is the prepared networks' own: each casts inside its forward, and the rest of a loss, the
        teacher's answers and the data among it, keeps the precision that it has everywhere else.
        """
        role = self._roles[phase.role]
        outputs: list[tuple[ObjectiveOutput, float]] = []
        micro_batches = batch.split(self._rows)
        for number, micro in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            share = len(micro) / len(batch)
            with nullcontext() if last else self._accelerator.no_sync(role.network):
                output = phase.loss(micro)
                self._accelerator.backward(output.loss * share)
            outputs.append((replace(output, loss=output.loss.detach()), share))
        return outputs

    def _outcome(self, role: Role, outputs: list[tuple[ObjectiveOutput, float]], norm: Tensor) -> Step:
        """A phase's figures over all workers, in one transfer from the device."""
        device = self._accelerator.device
        names = list(outputs[0][0].metrics)
        shares = torch.tensor([share for _, share in outputs], device=device)

        def mean(values: Iterable[Tensor | float]) -> Tensor:
            columns = [torch.as_tensor(value, device=device).detach().float() for value in values]
            return (torch.stack(columns) * shares).sum()

        scalars = [mean(output.loss for output, _ in outputs)]
        scalars += [mean(output.metrics[name] for output, _ in outputs) for name in names]
        columns = [value.float().reshape(1) for value in (*scalars, norm)]
        losses = torch.cat([output.per_sample for output, _ in outputs]).float()
        rows = gathered(self._accelerator, torch.cat([*columns, losses])[None])
        loss, *metrics, norm = rows[:, : len(columns)].mean(0)
        return Step(
            loss=float(loss),
            per_sample=rows[:, len(columns) :].flatten(),
            metrics={name: float(value) for name, value in zip(names, metrics, strict=True)},
            grad_norm=float(norm),
            learning_rate=role.learning_rate(self._update),
        )

    def _check(self, role: Role, step: Step) -> None:
        """Raises DivergenceError, on all workers alike, before a step that would spoil the weights."""
        bad = int((~torch.isfinite(step.per_sample)).sum())
        if bad:
            raise self._divergence(f"{bad} of {len(step.per_sample)} losses of the {role.name} are not finite")
        if math.isfinite(step.grad_norm):
            return
        scaler = self._accelerator.scaler
        if scaler is None:
            raise self._divergence(f"the norm of the {role.name}'s gradient is {step.grad_norm}")
        if scaler.get_scale() < LEAST_LOSS_SCALE:  # else the scaler skips the step, and scales by less from now on
            raise self._divergence(
                f"the {role.name}'s gradient overflows though the loss is scaled by {scaler.get_scale():g} only"
            )

    def _divergence(self, finding: str) -> DivergenceError:
        return DivergenceError(
            f"update {self._update}: {finding}; the last good checkpoint is {self._checkpoints.newest() or 'none'}: "
            "lower learner.optimizer.learning_rate, or set thresholding, and run again to resume"
        )


def gathered(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """The rows of all workers, on the CPU; every worker has as many."""
    if accelerator.num_processes > 1:
        rows = gather(rows.to(accelerator.device))
    return rows.cpu()
