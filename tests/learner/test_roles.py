"""Networks by role: each its own optimizer and schedule, stepped in phases on one batch, resumed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_dist.config import OptimizerConfig
from ddil_dist.states import States
from learner.methods import ObjectiveOutput, Phase
from learner.trainer import Trainer
from learner.update_record import UpdateRecord
from tests.learner.support import SeededSource, learner_config, make_trainer

EVERY = 2
FAKE = OptimizerConfig(learning_rate=0.02, betas=(0.5, 0.9), weight_decay=0.0, schedule="constant", warmup_updates=0)


class Affine(nn.Module):
    """x to gain x + bias; all the same at any call."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.gain = nn.Parameter(torch.tensor(gain))
        self.bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.bias


class TwoRoles:
    """The fake score learns what the student makes, every update; the student flees from it, every second one.

    A target follows the student after every update. It notes who required gradients in each phase.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._student, self._fake = networks["student"], networks["fake_score"]
        self.target = Affine(0.0).requires_grad_(False)
        self.noted: list[tuple[str, bool, bool]] = []

    def phases(self, update: int) -> Sequence[Phase]:
        student = (Phase("student", self._student_loss),) if update % EVERY == 0 else ()
        return (*student, Phase("fake_score", self._fake_loss))

    def retry(self, update: int) -> None:
        pass

    def after_update(self, update: int) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.target.parameters(), self._student.parameters(), strict=True):
                mine.lerp_(theirs.detach(), 0.5)

    @property
    def state(self) -> Mapping[str, nn.Module]:
        return {"target": self.target}

    def _student_loss(self, batch: States[torch.Tensor]) -> ObjectiveOutput:
        made = self._student(batch.x_t)
        return self._output("student", -0.1 * (made - self._fake(made)) ** 2 + (made - batch.x_t) ** 2, {"made": made})

    def _fake_loss(self, batch: States[torch.Tensor]) -> ObjectiveOutput:
        made = self._student(batch.x_t).detach()
        return self._output("fake_score", (self._fake(batch.x_t) - made) ** 2, {})

    def _output(self, role: str, errors: Tensor, metrics: dict[str, Tensor]) -> ObjectiveOutput:
        student, fake = (next(network.parameters()).requires_grad for network in (self._student, self._fake))
        self.noted.append((role, student, fake))
        per_sample = errors.flatten(1).mean(1)
        return ObjectiveOutput(
            per_sample.mean(), per_sample.detach(), {name: value.detach().mean() for name, value in metrics.items()}
        )


def run(directory: Path, *, stop_at: int | None = None, **changes: Any) -> tuple[Trainer, list[UpdateRecord]]:
    records: list[UpdateRecord] = []
    trainer = make_trainer(
        directory,
        config=learner_config(optimizers={"fake_score": FAKE}, **changes),
        networks={"student": Affine(0.5), "fake_score": Affine(-0.5)},
        make_objective=TwoRoles,
        on_update=records.append,
    )
    trainer.run(should_stop=lambda: trainer.update == stop_at)
    return trainer, records


def everything(trainer: Trainer) -> dict[str, float]:
    networks = {name: role.raw for name, role in trainer._roles.items()} | dict(trainer._objective.state)
    return {f"{name}.{key}": float(value) for name, net in networks.items() for key, value in net.state_dict().items()}


def by_hand(*, updates: int = 6) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Weights of all three networks at the end, and the losses of each update, from a loop in the open."""
    student, fake = Affine(0.5), Affine(-0.5)
    objective, source = TwoRoles({"student": student, "fake_score": fake}), SeededSource()
    of_student = torch.optim.AdamW(student.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.01)
    of_fake = torch.optim.AdamW(fake.parameters(), lr=0.02, betas=(0.5, 0.9), weight_decay=0.0)
    losses = []
    for update, factor in zip(range(updates), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25], strict=True):
        batch, loss = source.next(progress=0.0), {}
        for phase in objective.phases(update):
            network, optimizer = (student, of_student) if phase.role == "student" else (fake, of_fake)
            of_student.param_groups[0]["lr"] = 0.05 * factor
            student.zero_grad()
            fake.zero_grad()
            output = phase.loss(batch)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            loss[phase.role] = output.loss.item()
        objective.after_update(update)
        losses.append(loss)
    networks = {"student": student, "fake_score": fake, "target": objective.target}
    return {f"{n}.{k}": float(v) for n, net in networks.items() for k, v in net.state_dict().items()}, losses


@pytest.mark.parametrize("micro", [None, 2])
def test_phases_step_their_own_role_as_a_loop_by_hand_does(tmp_path: Path, micro: int | None) -> None:
    trainer, records = run(tmp_path, micro_batch_size=micro)
    wanted, losses = by_hand()
    assert everything(trainer) == pytest.approx(wanted, rel=1e-5)
    assert [record.losses.keys() for record in records] == [loss.keys() for loss in losses]
    for record, loss in zip(records, losses, strict=True):
        assert record.losses == pytest.approx(loss, rel=1e-5)


def test_only_the_phases_own_role_requires_gradients(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, updates=2)
    objective = trainer._objective
    assert isinstance(objective, TwoRoles)
    assert objective.noted == [("student", True, False), ("fake_score", False, True), ("fake_score", False, True)]


def test_a_record_shows_the_students_last_step_and_every_phases_metrics(tmp_path: Path) -> None:
    _, records = run(tmp_path)
    assert [record.metrics.keys() == {"student/made"} for record in records] == [True, False] * 3
    for one, other in zip(records[0::2], records[1::2], strict=True):
        assert one.loss == one.losses["student"]
        assert (other.loss, other.learning_rate) == (one.loss, one.learning_rate)
    assert records[0].learning_rate == pytest.approx(0.025)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_every_role_and_the_objectives_own_networks_are_resumed(tmp_path: Path, stop_at: int) -> None:
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_at=stop_at)
    resumed, records = run(tmp_path / "cut")
    assert len(records) == 6 - stop_at
    assert everything(resumed) == everything(whole)
    assert resumed.final_weights() == whole.final_weights()


def test_a_resumed_run_obeys_the_optimizer_that_is_configured_now(tmp_path: Path) -> None:
    run(tmp_path, stop_at=2)
    now = OptimizerConfig(learning_rate=0.5, betas=(0.1, 0.2), weight_decay=0.3, schedule="constant", warmup_updates=0)
    trainer, records = run(tmp_path, stop_at=3, optimizer=now)
    group = trainer._roles["student"]._optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.1, 0.2), 0.3)
    assert records[0].learning_rate == 0.5
