"""The training loop against the same loop by hand; publishing, recording, and faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_dist.config import OptimizerConfig
from ddil_dist.errors import DivergenceError
from ddil_dist.journal import read_journal
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.states import States
from ddil_dist.types import WeightsVersion
from ddil_dist.weights import InMemoryWeightStore, unpack
from learner.methods import ObjectiveOutput
from learner.methods.progressive import ProgressiveObjective
from learner.update_record import UpdateRecord
from tests.learner.support import (
    GRID,
    SCHEDULE,
    SeededSource,
    learner_config,
    make_trainer,
    new_network,
    objective_of,
    weights_of,
)

LINEAR = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
"""Learning-rate factors of six updates, two of them warm-up."""


def train_by_hand(*, updates: int = 6, decay: float = 0.8, max_norm: float = 1.0) -> list[dict[str, Any]]:
    """Weights and their average after each update, from torch's own AdamW and the EMA's formula."""
    network, source = new_network(), SeededSource()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05, betas=(0.9, 0.999), weight_decay=0.01)
    average: dict[str, float] = {}
    history = []
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * LINEAR[update]
        output = objective_of(network).loss(source.next(progress=0.0))
        optimizer.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        now = weights_of(network)
        # The average begins at the weights of the first update.
        average = {key: decay * average.get(key, value) + (1 - decay) * value for key, value in now.items()}
        history.append({"weights": now, "average": average, "loss": output.loss.item(), "norm": float(norm)})
    return history


def final(trainer: Any) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.final_weights().items()}


def test_updates_are_those_of_the_loop_by_hand(tmp_path: Path) -> None:
    records: list[UpdateRecord] = []
    store = InMemoryWeightStore()
    trainer = make_trainer(tmp_path, weights=store, on_update=records.append)
    assert trainer.run() is True
    wanted = train_by_hand()
    assert [record.update for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record.loss for record in records] == pytest.approx([step["loss"] for step in wanted], rel=1e-5)
    assert [record.grad_norm for record in records] == pytest.approx([step["norm"] for step in wanted], rel=1e-4)
    assert [record.learning_rate for record in records] == pytest.approx([0.05 * factor for factor in LINEAR])
    assert final(trainer) == pytest.approx(wanted[-1]["average"], rel=1e-5)
    published = {name: float(value) for name, value in unpack(store.load(6)).items()}
    assert published == pytest.approx(wanted[-1]["weights"], rel=1e-5)


def test_without_an_average_the_last_weights_are_exported(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, config=learner_config(ema_decay=0.0))
    trainer.run()
    assert final(trainer) == pytest.approx(train_by_hand()[-1]["weights"], rel=1e-5)


def test_before_the_first_update_the_student_is_exported_as_it_is(tmp_path: Path) -> None:
    assert final(make_trainer(tmp_path)) == pytest.approx(weights_of(new_network()))


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_make_the_same_updates_as_the_whole_batch(tmp_path: Path, micro: int) -> None:
    records: list[UpdateRecord] = []
    trainer = make_trainer(tmp_path, config=learner_config(micro_batch_size=micro), on_update=records.append)
    trainer.run()
    wanted = train_by_hand()
    assert [record.loss for record in records] == pytest.approx([step["loss"] for step in wanted], rel=1e-4)
    # Clipping and AdamW hide a wrong scale from the weights, not from the norm.
    assert [record.grad_norm for record in records] == pytest.approx([step["norm"] for step in wanted], rel=1e-3)
    assert final(trainer) == pytest.approx(wanted[-1]["average"], rel=1e-4)


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    config = learner_config(
        optimizer=OptimizerConfig(learning_rate=0.05, warmup_updates=2, max_grad_norm=1e-10)  # under AdamW's epsilon
    )
    trainer = make_trainer(tmp_path, config=config)
    trainer.run()
    assert final(trainer) == pytest.approx(train_by_hand(max_norm=1e-10)[-1]["average"], rel=1e-5)
    assert final(trainer) != pytest.approx(train_by_hand()[-1]["average"], rel=1e-3)


def test_the_loss_falls(tmp_path: Path) -> None:
    teacher = new_network()
    with torch.no_grad():
        teacher.gain.add_(0.3)
        teacher.bias.sub_(0.4)
    source = SeededSource(num=24)

    def with_answers(update: int, batch: States[torch.Tensor]) -> States[torch.Tensor]:
        from ddil_dist.policy import StudentPolicy
        from tests.support.problem import CPU

        policy = StudentPolicy(objective_of(teacher)._student, GRID, CPU)
        with torch.no_grad():
            label = policy.step(batch.x_t, batch.step_index, batch.conditioning, batch.guidance_scale)
        return replace(batch, label=label)

    source.spoil = with_answers
    records: list[UpdateRecord] = []
    config = learner_config(updates=80, batch_size=24, publish_every=80, checkpoint_every=80)
    trainer = make_trainer(tmp_path, config=config, source=source, on_update=records.append)
    trainer.run()
    assert records[-1].loss < 0.01 * records[0].loss
    assert final(trainer) == pytest.approx(weights_of(teacher), abs=0.05)


def test_the_prior_is_asked_for_by_the_share_of_updates_done(tmp_path: Path) -> None:
    source = SeededSource()
    make_trainer(tmp_path, source=source).run()
    assert source.progress == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])


def test_versions_are_published_at_0_every_few_and_last(tmp_path: Path) -> None:
    published: list[WeightsVersion] = []
    store = InMemoryWeightStore()
    trainer = make_trainer(tmp_path, config=learner_config(updates=5), weights=store, on_publish=published.append)
    trainer.run()
    assert [version.version for version in published] == [0, 2, 4, 5]
    assert [version.progress for version in published] == pytest.approx([0, 0.4, 0.8, 1.0])
    assert store.newest() == published[-1]
    lines = [entry for entry in read_journal(tmp_path / "metrics.jsonl") if entry["kind"] == "publish"]
    assert [(entry["version"], entry["digest"]) for entry in lines] == [(v.version, v.digest) for v in published]


def test_version_0_is_the_student_before_training(tmp_path: Path) -> None:
    store = InMemoryWeightStore()
    trainer = make_trainer(tmp_path, config=learner_config(updates=1), weights=store)
    trainer.run()
    assert {name: float(value) for name, value in unpack(store.load(0)).items()} == weights_of(new_network())


def test_every_update_is_recorded_with_what_it_trained_on(tmp_path: Path) -> None:
    records: list[UpdateRecord] = []
    make_trainer(tmp_path, config=learner_config(updates=1), on_update=records.append).run()
    (record,) = records
    per_sample = objective_of(new_network()).loss(SeededSource().next(progress=0)).per_sample.tolist()
    by_source = {"FORWARD": per_sample[0::3], "STUDENT": per_sample[1::3], "TEACHER": per_sample[2::3]}
    assert record.loss_by_source == pytest.approx({k: sum(v) / len(v) for k, v in by_source.items()}, rel=1e-5)
    by_timestep = {str(t): per_sample[i::4] for i, t in enumerate(GRID.student)}
    assert record.loss_by_timestep == pytest.approx({k: sum(v) / len(v) for k, v in by_timestep.items()}, rel=1e-5)
    assert record.sources == {"FORWARD": 2, "STUDENT": 2, "TEACHER": 2}
    assert record.policy_versions == {"-1": 4, "4": 2}
    assert record.staleness_mean == pytest.approx(5 / 6)
    assert record.staleness_max == 4
    (line,) = (entry for entry in read_journal(tmp_path / "metrics.jsonl") if entry["kind"] == "update")
    assert {key: value for key, value in line.items() if key not in ("kind", "time")} == vars(record)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(tmp_path: Path) -> None:
    source = SeededSource()

    def spoil(update: int, batch: States[torch.Tensor]) -> States[torch.Tensor]:
        if update == 3:
            assert batch.label is not None
            batch.label[1, 0, 0, 0] = float("nan")
        return batch

    source.spoil = spoil
    store = InMemoryWeightStore()
    trainer = make_trainer(tmp_path, source=source, weights=store)
    with pytest.raises(DivergenceError, match=r"update 3: 1 of 6 losses .*checkpoints/update_00000002.*learning_rate"):
        trainer.run()
    assert final(trainer) == pytest.approx(train_by_hand(updates=3)[-1]["average"], rel=1e-5)
    newest = store.newest()
    assert newest is not None
    assert newest.version == 2


class Kinked(ProgressiveObjective):
    """Adds 0 to the loss, with a slope of 0 times infinity."""

    def loss(self, batch: States[torch.Tensor]) -> ObjectiveOutput:
        output = super().loss(batch)
        kink = (self._student.unet.get_parameter("gain") * 0).sqrt()
        return replace(output, loss=output.loss + kink)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(tmp_path: Path) -> None:
    def make_objective(networks: Mapping[str, torch.nn.Module]) -> Kinked:
        return Kinked(Denoiser(networks["student"], SCHEDULE, "v_prediction"), GRID, "truncated_snr")

    trainer = make_trainer(tmp_path, make_objective=make_objective)
    with pytest.raises(DivergenceError, match=r"update 0: the norm of the student's gradient is nan; .* is none"):
        trainer.run()
    assert final(trainer) == pytest.approx(weights_of(new_network()))
