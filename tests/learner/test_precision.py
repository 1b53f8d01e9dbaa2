"""Mixed precision: bfloat16 close to float32; float16 with a loss scale that skips overflows and is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ddil_dist.errors import DivergenceError
from ddil_dist.policy import TeacherPolicy
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods import create_networks, create_objective
from learner.trainer import Trainer
from learner.update_record import UpdateRecord
from tests.learner.group import network
from tests.learner.support import SeededSource, learner_config, make_trainer
from tests.support.problem import tiny_problem


def fp16_accelerator(scale: float) -> Accelerator:
    """Accelerate as it is set up for float16 on a GPU, with the real scaler, on the CPU (which it does not offer)."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


@pytest.fixture(autouse=True)
def _own_accelerate_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(directory: Path, accelerator: Accelerator, *, stop_at: int | None = None) -> tuple[Trainer, list[UpdateRecord]]:
    records: list[UpdateRecord] = []
    trainer = make_trainer(
        directory,
        accelerator=accelerator,
        network=network(),
        on_update=records.append,
        config=learner_config(updates=8),
    )
    trainer.run(should_stop=lambda: trainer.update == stop_at)
    AcceleratorState._reset_state(reset_partial_state=True)
    return trainer, records


def test_bfloat16_trains_as_float32_does_to_its_precision(tmp_path: Path) -> None:
    _, single = run(tmp_path / "single", Accelerator(cpu=True))
    trainer, half = run(tmp_path / "half", Accelerator(cpu=True, mixed_precision="bf16"))
    assert half[0].loss == pytest.approx(single[0].loss, rel=0.05)
    assert half[0].loss != single[0].loss
    assert {tensor.dtype for tensor in trainer.final_weights().values()} == {torch.float32}


def test_float16_skips_what_overflows_and_a_resumed_run_keeps_the_loss_scale(tmp_path: Path) -> None:
    huge = 2.0**20
    whole = fp16_accelerator(huge)
    trainer, all_records = run(tmp_path / "whole", whole)
    assert whole.scaler.get_scale() < huge
    norms = [record.grad_norm for record in all_records]
    assert norms[0] == 0.0, "the first update overflows and is skipped"
    assert max(norms) > 0.0, "until the scale has fallen"
    _, before = run(tmp_path / "cut", fp16_accelerator(huge), stop_at=3)
    resumed_by = fp16_accelerator(64.0)  # what it begins with must not matter
    resumed, after = run(tmp_path / "cut", resumed_by)
    assert [record.grad_norm for record in (*before, *after)] == norms
    assert resumed_by.scaler.state_dict() == whole.scaler.state_dict()
    wanted = trainer.final_weights()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.final_weights().items())


def test_float16_that_overflows_at_any_scale_stops(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"the student's gradient overflows though the loss is scaled by 0\.00"):
        make_trainer(
            tmp_path,
            accelerator=fp16_accelerator(2.0**-9),
            network=_Overflowing(),
            config=learner_config(updates=8),
        ).run()


class _Overflowing(torch.nn.Module):
    """Finite outputs, infinite gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"time_cond_proj_dim": 16}
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        return (x + self.weight.abs().sqrt(),)


def test_only_the_networks_that_are_trained_run_in_mixed_precision(tiny_directory: Path, tmp_path: Path) -> None:
    problem = tiny_problem(
        tiny_directory,
        "objective.type=distribution_matching",
        "student.spacing=trailing",
        "rollout.labels=learner",
        "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]",
        "objective.generator_every=1",
        f"run.directory={tmp_path}",
    )
    networks = create_networks(problem.config, problem)
    inside: dict[str, list[bool]] = {"teacher": [], "vae": [], "student": [], "fake_score": []}
    answers: list[tuple[tuple[Any, ...], torch.Tensor]] = []

    def listen(name: str, module: Any) -> None:
        module.register_forward_pre_hook(lambda *_: inside[name].append(torch.is_autocast_enabled("cpu")))

    listen("teacher", problem.teacher.unet.conv_in)
    listen("vae", problem.teacher.pipeline.vae.encoder)
    listen("student", networks["student"].conv_in)
    listen("fake_score", networks["fake_score"].unet.conv_in)
    ask = TeacherPolicy.predict_x_0

    def heard(self: TeacherPolicy, *told: Any) -> torch.Tensor:
        answers.append((told, ask(self, *told)))
        return answers[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherPolicy, "predict_x_0", heard)
        trainer = make_trainer(
            tmp_path,
            networks=networks,
            make_objective=lambda prepared: create_objective(problem.config, problem, prepared),
            accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
            config=learner_config(updates=2, ema_decay=0.0),
            source=RightPrompts(problem),
        )
        trainer.run()
    assert {name: set(seen) for name, seen in inside.items()} == {
        "teacher": {False},
        "vae": {False},
        "student": {True},
        "fake_score": {True},
    }
    for told, answer in answers:  # labels of actors and of the prefetching thread are made as here
        assert torch.equal(ask(problem.teacher_policy(), *told), answer)


class RightPrompts(SeededSource):
    """Batches whose conditioning is of the problem's own encoder."""

    def __init__(self, problem: ImitationProblem) -> None:
        super().__init__()
        self._encoder = problem.encoder

    def next(self, **told: Any) -> States[torch.Tensor]:
        batch = super().next(**told)
        return replace(batch, conditioning=self._encoder.encode(["a red square"] * len(batch)))
