"""Memory: what is estimated beforehand, and what happens when it runs out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_dist.config import OptimizerConfig
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.errors import EnvironmentFailure
from ddil_dist.journal import read_journal
from ddil_dist.methods import DistributionMatching, Dmd, Dmd2
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.policy import StudentPolicy
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from ddil_dist.types import StateSource
from learner.memory import activation_bytes
from learner.methods import Objective
from learner.methods.distribution_matching import DistributionMatchingObjective, ScoreDifference
from learner.methods.dmd import DmdObjective
from learner.update_record import UpdateRecord
from tests.learner.support import GRID, SCHEDULE, SeededSource, learner_config, make_trainer, new_network
from tests.learner.test_distribution_matching import gaussian, identity, teacher_of
from tests.learner.test_trainer import final, train_by_hand
from tests.support.cheap import CheapUNet
from tests.support.problem import CPU, draw_states, tiny_problem


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
            if not output.requires_grad:
                return (output,)
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


def policy_of(network: nn.Module, *, one_step: bool) -> StudentPolicy:
    grid = TrajectoryGrid.create(1, 8, spacing="linspace") if one_step else GRID
    return StudentPolicy(Denoiser(network, SCHEDULE, "v_prediction"), grid, CPU)


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize(
    ("narrow", "rows", "micro"),
    [("student", 4, None), ("student", 2, None), ("fake_score", 4, None), ("fake_score", 2, 3), ("fake_score", 1, 3)],
)
def test_after_running_out_of_memory_the_critic_learns_from_its_own_rows(
    tmp_path: Path, narrow: str, rows: int, micro: int | None, one_step: bool
) -> None:
    """The samples that the critic is shown are the student's at the very rows that it is shown them with."""
    networks = {
        "student": new_network(),
        "fake_score": new_network(),
        narrow: Narrow(rows, in_backward=narrow == "student"),
    }
    config: DistributionMatching = Dmd() if one_step else Dmd2(gan=None, generator_every=2, generator_input="prior")
    seen: list[tuple[torch.Tensor, States[torch.Tensor]]] = []

    class Watched(ScoreDifference):
        def denoising(self, x: Tensor, batch: States[torch.Tensor]) -> Tensor:
            seen.append((x, batch))
            return super().denoising(x, batch)

    def make_objective(prepared: Mapping[str, nn.Module]) -> Objective:
        critic = Denoiser(prepared["fake_score"], SCHEDULE, "v_prediction")
        student = policy_of(prepared["student"], one_step=one_step)
        scores = Watched(config, teacher=teacher_of(gaussian(0, 1)), critic=critic, threshold=identity)
        if isinstance(config, Dmd):
            return DmdObjective(config, student=student, scores=scores, projection=identity)
        assert isinstance(config, Dmd2)
        return DistributionMatchingObjective(
            config, student=student, scores=scores, critic=critic, real=None, projection=identity
        )

    source = SeededSource()
    source.spoil = lambda update, batch: replace(batch, source=torch.full((len(batch),), int(StateSource.STUDENT)))
    still = OptimizerConfig(learning_rate=1e-12, warmup_updates=0)  # so that the student stays what it was
    trainer = make_trainer(
        tmp_path,
        networks=networks,
        source=source,
        make_objective=make_objective,
        config=learner_config(updates=3, micro_batch_size=micro, optimizer=still),
    )
    trainer.run()
    original = policy_of(new_network(), one_step=one_step)
    assert len(seen) > 3
    for x, batch in seen:
        t = torch.tensor(original.grid.student)[torch.zeros_like(batch.step_index) if one_step else batch.step_index]
        wanted = original.predict_x_0(batch.x_t, t, batch.conditioning, batch.guidance_scale)
        torch.testing.assert_close(x, wanted.detach(), rtol=1e-5, atol=1e-5)


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
    assert str(replace(estimate, activations=3_000_000, average=0)) == (
        "3 MB (weights 0 MB, gradients 0 MB, optimizer 0 MB, activations 3 MB for 3 rows a backward pass)"
    )
    (line,) = (entry for entry in read_journal(tmp_path / "metrics.jsonl") if entry["kind"] == "memory")
    assert line["activations_bytes"] == 300
    assert line["rows"] == 3


def test_an_adapters_frozen_base_is_no_activation(tiny_directory: Path) -> None:
    """What an adapter keeps for its backward pass is about what the whole network keeps: never the weights."""
    problem = tiny_problem(tiny_directory, "student.lora={rank: 2}")
    network = problem.new_student()
    rows = [activation_bytes(partial(one_row, problem, network, num), network, problem.teacher.unet) for num in (1, 3)]
    assert rows[1] == pytest.approx(3 * rows[0], rel=0.1), "so nothing is counted that does not grow with the rows"


def one_row(problem: ImitationProblem, network: torch.nn.Module, num: int) -> torch.Tensor:
    x_t, _, told, scale = draw_states(problem, num)
    t = torch.full((num,), 500)
    return problem.student_denoiser(network).predict(x_t, t, told, scale)
