"""What one of two workers does in `test_parallel`: the same training, with half of every batch. Run by it, not alone.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python -m tests.learner.group DIRECTORY

With a world of one it is what two workers are held to. Each scenario leaves DIRECTORY/<name>-<rank>.json, with its
weights beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import softplus

from ddil_dist.config import LearnerConfig, OptimizerConfig
from ddil_dist.errors import DivergenceError
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.states import States
from ddil_dist.weights import InMemoryWeightStore, unpack
from learner.assemble import sharding_plugin
from learner.methods import ObjectiveOutput, Phase
from learner.methods.critic import Critic, discriminator
from learner.trainer import Trainer
from learner.update_record import UpdateRecord
from tests.learner.support import GRID, SCHEDULE, SeededSource, learner_config, make_batch, make_trainer, objective_of
from tests.learner.test_memory import Narrow
from tests.learner.test_roles import FAKE, Affine, TwoRoles

ROWS = 12
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Shared(SeededSource):
    """Each worker's rows of one batch for all."""

    def next(self, *, progress: float, on_wait: Callable[[], None] = lambda: None) -> States[torch.Tensor]:
        self.progress.append(progress)
        rows = torch.arange(ROWS).chunk(WORLD)[RANK]
        return self.spoil(len(self.progress) - 1, make_batch(self._generator, ROWS).rows(rows.tolist()))


class Starved(Shared):
    """The last worker's third batch never comes."""

    def next(self, *, progress: float, on_wait: Callable[[], None] = lambda: None) -> States[torch.Tensor]:
        while len(self.progress) == 2 and RANK == WORLD - 1:
            on_wait()
        return super().next(progress=progress)


def network() -> nn.Module:
    """A real U-Net, the same on every worker only after one told the others its weights.

    Of few tensors: what is shared is sent tensor by tensor, which takes two processes on few cores the most time.
    """
    torch.manual_seed(1 + RANK)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        time_cond_proj_dim=16,
    )
    assert isinstance(unet, nn.Module)
    return unet


def config(**changes: Any) -> LearnerConfig:
    optimizer = OptimizerConfig(learning_rate=0.002, warmup_updates=1)
    return learner_config(updates=4, batch_size=ROWS, optimizer=optimizer, **changes)


def train(
    directory: Path, name: str, settings: LearnerConfig, *, stop_at: int | None = None, **options: Any
) -> tuple[Trainer, list[UpdateRecord]]:
    records: list[UpdateRecord] = []
    trainer = make_trainer(
        directory / name, config=settings, source=Shared(), on_update=records.append, journal=RANK == 0, **options
    )
    trainer.run(should_stop=lambda: trainer.update == stop_at)
    return trainer, records


def leave(directory: Path, name: str, records: list[UpdateRecord], weights: Mapping[str, torch.Tensor]) -> None:
    kept = ("loss", "grad_norm", "loss_by_source", "loss_by_timestep", "sources", "staleness_mean", "metrics")
    lines = [{key: vars(record)[key] for key in kept} for record in records]
    (directory / f"{name}-{RANK}.json").write_text(json.dumps(lines))
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, directory / f"{name}-{RANK}.safetensors")


def together(directory: Path, name: str, **changes: Any) -> None:
    """Train, leave the losses and the averaged weights."""
    trainer, records = train(directory, name, config(**changes), network=network())
    leave(directory, name, records, trainer.final_weights())


def in_phases(directory: Path) -> None:
    """Two roles, of which one's phase calls the other's network."""
    networks = {"student": Affine(0.5 + RANK), "fake_score": Affine(-0.5 + RANK)}
    settings = config(optimizers={"fake_score": FAKE})
    trainer, records = train(directory, "phases", settings, networks=networks, make_objective=TwoRoles)
    weights = {f"{name}.{key}": value for name, role in trainer._roles.items() for key, value in role.weights().items()}
    leave(directory, "phases", records, weights)


class Strait(Affine):
    """Has memory for so many rows a pass that it is trained in; `passes` are the rows of each."""

    def __init__(self, gain: float, rows: int) -> None:
        super().__init__(gain)
        self.rows = rows
        self.passes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.gain.requires_grad:
            self.passes.append(len(x))
            if len(x) > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


class Late(TwoRoles):
    """The student steps in the fourth update only, and then calls the fake score, which had its first steps before."""

    def phases(self, update: int) -> Sequence[Phase]:
        student, fake = super().phases(0)
        return (student, fake) if update == 3 else (fake,)


def a_late_role_runs_out_of_memory(directory: Path) -> None:
    """In its first step the student of the last of several workers has memory for three of its six rows."""
    student = Strait(0.5, 3 if RANK == WORLD - 1 > 0 else ROWS)
    networks = {"student": student, "fake_score": Affine(-0.5)}
    trainer, records = train(directory, "late", config(), networks=networks, make_objective=Late)
    weights = {f"{name}.{key}": value for name, role in trainer._roles.items() for key, value in role.weights().items()}
    leave(directory, "late", records, weights)
    assert WORLD == 1 or student.passes[-1] == 3


class Alternating:
    """Two networks of one shape, each of which learns the labels."""

    state: ClassVar[Mapping[str, nn.Module]] = {}

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._phases = [Phase(role, objective_of(network).loss) for role, network in networks.items()]

    def phases(self, update: int) -> Sequence[Phase]:
        return self._phases

    def after_update(self, update: int) -> None:
        pass


def alike(directory: Path, name: str) -> None:
    """Two roles with networks of as many parameters."""
    networks = {"student": network(), "fake_score": network()}
    trainer, records = train(directory, name, config(), networks=networks, make_objective=Alternating)
    weights = trainer.final_weights()
    if RANK == 0:
        leave(directory, name, records, weights)


class Judged:
    """A student whose loss asks the critic, which is first called there, frozen; and the critic's own."""

    state: ClassVar[Mapping[str, nn.Module]] = {}

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._student = Denoiser(networks["student"], SCHEDULE, "v_prediction")
        self._critic = Denoiser(networks["fake_score"], SCHEDULE, "v_prediction")
        self._discriminator = discriminator(self._critic)

    def phases(self, update: int) -> Sequence[Phase]:
        return (Phase("student", self.student_loss), Phase("fake_score", self.critic_loss))

    def after_update(self, update: int) -> None:
        pass

    def student_loss(self, batch: States[torch.Tensor]) -> ObjectiveOutput:
        return self._loss(self._student, batch, judged=True)

    def critic_loss(self, batch: States[torch.Tensor]) -> ObjectiveOutput:
        return self._loss(self._critic, batch, judged=False)

    def _loss(self, denoiser: Denoiser, batch: States[torch.Tensor], *, judged: bool) -> ObjectiveOutput:
        assert batch.label is not None
        t = torch.tensor(GRID.student)[batch.step_index]
        told = (t, batch.conditioning, batch.guidance_scale)
        prediction = denoiser.predict(batch.x_t, *told)
        logits = self._discriminator.predict(prediction if judged else batch.label, *told).squeeze(1)
        per_sample = (prediction - batch.label).square().flatten(1).mean(1) + softplus(-logits)
        return ObjectiveOutput(loss=per_sample.mean(), per_sample=per_sample.detach())


def judged(directory: Path, name: str) -> None:
    """A student and a critic of real blocks with a head, each in its own phase."""
    networks = {"student": network(), "fake_score": Critic(network(), discriminate=True)}
    trainer, records = train(directory, name, config(), networks=networks, make_objective=Judged)
    if WORLD > 1:
        fake = trainer._roles["fake_score"]
        assert sum(isinstance(module, FSDPModule) for module in fake.raw.modules()) > 1, "its blocks are shared apart"
    weights = trainer.final_weights()
    if RANK == 0:
        leave(directory, name, records, weights)


def one_diverges(directory: Path) -> None:
    """A label of the last worker's rows is not finite; every worker must say so."""
    source = Shared()

    def spoil(update: int, batch: States[torch.Tensor]) -> States[torch.Tensor]:
        if update == 1 and RANK == WORLD - 1:
            assert batch.label is not None
            batch.label[0, 0, 0, 0] = float("nan")
        return batch

    source.spoil = spoil
    trainer = make_trainer(directory / "diverging", config=config(), source=source, network=network())
    try:
        trainer.run()
    except DivergenceError as error:
        (directory / f"diverging-{RANK}.json").write_text(json.dumps(str(error)))


def one_runs_out_of_memory(directory: Path) -> None:
    """The last of several workers has memory for three of its six rows: all go on with three."""
    network = Narrow(3 if RANK == WORLD - 1 > 0 else ROWS)
    trainer, records = train(directory, "narrow", config(), network=network)
    leave(directory, "narrow", records, trainer.final_weights())
    assert WORLD == 1 or network.passes[-1] == 3


class EveryStudent:
    """Keeps what it is given to judge, after every update."""

    def __init__(self) -> None:
        self.judged: dict[int, dict[str, Tensor]] = {}

    def wants(self, update: int) -> bool:
        return update > 0 and update not in self.judged

    def judge(self, weights: Mapping[str, Tensor], *, update: int) -> None:
        self.judged[update] = {key: tensor.detach().clone() for key, tensor in weights.items()}


def stopped_and_resumed(directory: Path, name: str) -> None:
    """Stopped after two updates and taken up by a new trainer; versions published and students judged on the way."""
    store = InMemoryWeightStore() if RANK == 0 else None
    judge = EveryStudent() if RANK == 0 else None
    _, before = train(directory, name, config(), network=network(), stop_at=2, weights=store, keeper=judge)
    trainer, after = train(directory, name, config(), network=network(), weights=store, keeper=judge)
    averaged = trainer._average.weights()
    if RANK == 0:
        assert store is not None
        published = {f"published.{key}": value for key, value in unpack(store.load(4)).items()}
        assert judge is not None
        assert sorted(judge.judged) == [1, 2, 3, 4]
        shown = {f"judged.{update}.{key}": value for update, of in judge.judged.items() for key, value in of.items()}
        leave(directory, name, [*before, *after], {**averaged, **published, **shown})


def one_is_late(directory: Path) -> None:
    """The last worker's second batch takes its time; the others have waited for it, and say so."""
    source = Shared()
    late_s = 0.5

    def hold(update: int, batch: States[torch.Tensor]) -> States[torch.Tensor]:
        if update == 1 and RANK == WORLD - 1 > 0:
            time.sleep(late_s)
        return batch

    source.spoil = hold
    records: list[UpdateRecord] = []
    make_trainer(directory / "held", config=config(), network=network(), source=source, on_update=records.append).run()
    assert RANK == WORLD - 1 or records[1].wait_s > 0.8 * late_s


def stopped_while_one_waits(directory: Path) -> None:
    """The first worker is asked to stop some time after the last has begun to wait for a batch; then resumed."""
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(trainer.update)
        return RANK == 0 and asked.count(2) == 5

    before: list[UpdateRecord] = []
    trainer = make_trainer(
        directory / "starved", config=config(), network=network(), source=Starved(), on_update=before.append
    )
    assert not trainer.run(should_stop=should_stop)
    trainer, after = train(directory, "starved", config(), network=network())
    leave(directory, "starved", [*before, *after], trainer.final_weights())


def shard(mixed_precision: str = "no") -> None:
    """From here on networks are sharded, as they would be on GPUs; Accelerate itself does not offer it for CPUs."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    state = Accelerator(cpu=True).state
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = sharding_plugin(mixed_precision)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    np.random.seed(RANK)
    scenarios: list[Callable[[], None]] = [
        lambda: together(directory, "whole"),
        lambda: together(directory, "micro", micro_batch_size=ROWS // WORLD // 2),
        lambda: in_phases(directory),
        lambda: one_runs_out_of_memory(directory),
        lambda: a_late_role_runs_out_of_memory(directory),
        lambda: one_diverges(directory),
        lambda: stopped_and_resumed(directory, "resumed"),
        lambda: stopped_while_one_waits(directory),
        lambda: one_is_late(directory),
    ]
    for scenario in scenarios:
        scenario()
    if WORLD > 1:
        shard()
    stopped_and_resumed(directory, "sharded")
    alike(directory, "alike")
    judged(directory, "judged")
    if WORLD > 1:
        shard("bf16")
    judged(directory, "judged in half precision")
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
