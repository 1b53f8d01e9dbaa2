"""Memory: what is estimated beforehand, and what happens when it runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_dist.config import OptimizerConfig
from ddil_dist.errors import EnvironmentFailure
from ddil_dist.journal import read_journal
from learner.memory import activation_bytes
from learner.trainer import UpdateRecord
from tests.learner.support import learner_config, make_trainer, new_network
from tests.learner.test_trainer import final, train_by_hand
from tests.support.cheap import CheapUNet


class Narrow(CheapUNet):
    """Has memory for so many rows a pass and no more; `passes` are the rows of each that was tried."""

    def __init__(self, rows: int, *, in_backward: bool = False) -> None:
        super().__init__(guided=True, bias=0.1)
        self.rows = rows
        self.in_backward = in_backward
        self.passes: list[int] = []

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor]:
        self.passes.append(len(x))
        (output,) = super().forward(x, *arguments, **options)
        if len(x) <= self.rows:
            return (output,)
        if self.in_backward:
            output.register_hook(self._raise)
            return (output,)
        self._raise(output)
        raise AssertionError

    def _raise(self, tensor: Tensor) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tensor.nbytes} bytes")


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(
    ("rows", "passes", "said"),
    [(6, [6], []), (4, [6, 3, 3], [3]), (2, [6, 3, 2, 2, 2], [3, 2]), (1, [6, 3, 2] + [1] * 6, [3, 2, 1])],
)
def test_out_of_memory_takes_smaller_micro_batches_and_keeps_the_batch(
    tmp_path: Path, rows: int, passes: list[int], said: list[int], in_backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    network = Narrow(rows, in_backward=in_backward)
    records: list[UpdateRecord] = []
    trainer = make_trainer(tmp_path, network=network, on_update=records.append)
    trainer.run()
    wanted = train_by_hand()
    assert [record.loss for record in records] == pytest.approx([step["loss"] for step in wanted], rel=1e-4)
    assert [record.grad_norm for record in records] == pytest.approx([step["norm"] for step in wanted], rel=1e-3)
    assert final(trainer) == pytest.approx(wanted[-1]["average"], rel=1e-4)
    assert network.passes[: len(passes)] == passes
    assert max(network.passes[len(passes) :]) <= rows, "what did not fit is not tried again"
    lines = [entry for entry in read_journal(tmp_path / "metrics.jsonl") if entry["kind"] == "micro_batch"]
    assert [line["rows"] for line in lines] == said
    assert caplog.text.count("accumulated to the same batch of 6") == len(said)


def test_a_single_row_that_does_not_fit_ends_the_run_with_advice(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match=r"a backward pass of 1 rows .*CUDA out of memory.*micro_batch_size"):
        make_trainer(tmp_path, network=Narrow(0)).run()


def test_activations_are_what_the_backward_pass_keeps() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for rows in (1, 3):
        x = torch.zeros(rows, 4)
        # The input of either layer; the second's is also what ReLU keeps.
        assert activation_bytes(lambda x=x: network(x), network) == rows * (4 + 8) * 4  # type: ignore[misc]


def test_probing_changes_nothing() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    before = torch.get_rng_state()
    activation_bytes(lambda: network(torch.ones(2, 4)), network)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(("kind", "moment_bytes"), [("adamw", 4), ("adamw_fused", 4)])
def test_an_estimate_counts_every_copy(tmp_path: Path, kind: Any, moment_bytes: int) -> None:
    network = new_network()
    num = sum(parameter.numel() for parameter in network.parameters())
    config = learner_config(optimizer=OptimizerConfig(type=kind), micro_batch_size=3)
    estimate = make_trainer(tmp_path, network=network, config=config).estimate_memory(100)
    assert estimate.weights == estimate.gradients == estimate.average == 4 * num
    assert estimate.optimizer == 2 * moment_bytes * num
    assert estimate.activations == 300
    assert estimate.total == 4 * num * 3 + 2 * moment_bytes * num + 300
    (line,) = (entry for entry in read_journal(tmp_path / "metrics.jsonl") if entry["kind"] == "memory")
    assert line["activations_bytes"] == 300
    assert line["rows"] == 3
