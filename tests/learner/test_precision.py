"""Mixed precision: bfloat16 close to float32; float16 with a loss scale that skips overflows and is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ddil_dist.errors import DivergenceError
from learner.trainer import Trainer, UpdateRecord
from tests.learner.group import network
from tests.learner.support import learner_config, make_trainer


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
    huge = 2.0**24
    whole = fp16_accelerator(huge)
    trainer, all_records = run(tmp_path / "whole", whole)
    assert whole.scaler.get_scale() < huge
    norms = [record.grad_norm for record in all_records]
    assert norms[0] == 0.0, "the first update overflows and is skipped"
    assert norms[-1] > 0.0, "until the scale has fallen"
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
