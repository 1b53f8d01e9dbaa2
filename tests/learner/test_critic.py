"""The critic: a U-Net that still is one, a head on its bottleneck, and who gets gradient from what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddil_dist.methods import FAKE_SCORE
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods import STUDENT, create_networks, create_objective
from learner.methods.critic import Critic, bottleneck, create_head, discriminator
from learner.methods.distribution_matching import DistributionMatchingObjective
from learner.methods.real_data import RealData
from tests.support.problem import draw_states, perturbed, tiny_problem
from tests.support.states import train_batch

DMD2 = (
    "objective.type=distribution_matching",
    "rollout.labels=learner",
    "student.spacing=trailing",
    "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]",
    "learner.batch_size=4",
    "run.seed=3",
)


def dmd2_problem(directory: Path, *overrides: str) -> ImitationProblem:
    return tiny_problem(directory, *DMD2, *overrides)


def batch_of(problem: ImitationProblem, num: int = 4) -> States[torch.Tensor]:
    x_t, index, conditioning, scales = draw_states(problem, num)
    whole = torch.zeros(num, dtype=torch.int64)
    return train_batch(x_t, index, conditioning, scales, None, whole.to(torch.uint8), whole - 1, whole)


def objective_of(problem: ImitationProblem) -> tuple[DistributionMatchingObjective, dict[str, nn.Module]]:
    networks = create_networks(problem.config, problem)
    perturbed(networks[FAKE_SCORE])
    objective = create_objective(problem.config, problem, networks)
    assert isinstance(objective, DistributionMatchingObjective)
    return objective, networks


SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
TOLD_SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"time_cond_proj_dim": 32},
        {**TOLD_SIZES, "projection_class_embeddings_input_dim": 24 + 6 * 8},
        {"mid_block_type": None},
    ],
    ids=["stable-diffusion", "guidance embedding", "told sizes", "no middle"],
)
def test_the_bottleneck_is_what_the_whole_network_passes_through(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**SMALL, **changes})
    told: dict[str, Any] = {}
    if "time_cond_proj_dim" in changes:
        told["timestep_cond"] = torch.randn(2, 32)
    if "addition_embed_type" in changes:
        told["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 24), "time_ids": torch.randn(2, 6)}
    arguments = (torch.randn(2, 4, 8, 8), torch.tensor([7, 801]), torch.randn(2, 5, 16))
    seen: list[Tensor] = []
    # The up half's first block is handed the bottleneck.
    unet.up_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        unet(*arguments, return_dict=False, **told)
        features = bottleneck(unet, *arguments, return_dict=False, **told)
    torch.testing.assert_close(features, seen[0])


def convolutions(head: nn.Sequential) -> list[tuple[Any, ...]]:
    return [
        (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0])
        for layer in head
        if isinstance(layer, nn.Conv2d)
    ]


def test_the_head_of_a_stable_diffusion_xl_network_is_dmd2s() -> None:
    xl = {"block_out_channels": (320, 640, 1280), "sample_size": 128}
    halving = (1280, 1280, 4, 2, 1)
    head = create_head(xl, xl["sample_size"])
    assert convolutions(head) == [halving, halving, halving, (1280, 1280, 4, 1, 0), (1280, 1, 1, 1, 0)]
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Conv2d", "GroupNorm", "SiLU"] * 4 + ["Conv2d"]
    v1 = {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}
    assert convolutions(create_head(v1, v1["sample_size"]))[:2] == [halving, (1280, 1280, 4, 1, 0)]
    assert create_head({"block_out_channels": (16, 24)}, 16)(torch.randn(3, 24, 8, 8)).shape == (
        3,
        1,
        1,
        1,
    )


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_logits_are_the_heads_of_the_bottleneck(tiny_directory: Path, features: str) -> None:
    problem = dmd2_problem(tiny_directory, f"objective.gan.features={features}")
    critic = create_networks(problem.config, problem)[FAKE_SCORE]
    assert isinstance(critic, Critic)
    perturbed(critic)
    batch = batch_of(problem)
    t = torch.tensor([5, 300, 700, 999])
    denoiser = Denoiser(critic, problem.teacher.schedule, "epsilon")
    with torch.no_grad():
        logits = discriminator(denoiser).predict(batch.x_t, t, batch.conditioning, batch.guidance_scale)
        seen: list[Tensor] = []
        reader: Any = critic.unet if features == "fake_score" else problem.teacher.unet
        handle = reader.mid_block.register_forward_hook(lambda _, args, output: seen.append(output))
        as_unet = denoiser.predict(batch.x_t, t, batch.conditioning, batch.guidance_scale)
        if features == "teacher":
            problem.teacher.denoiser().predict(batch.x_t, t, batch.conditioning)
        handle.remove()
        assert critic.head is not None
        torch.testing.assert_close(logits, critic.head(seen[0]).mean((2, 3)))
        own = Denoiser(critic.unet, problem.teacher.schedule, "epsilon")
        assert torch.equal(as_unet, own.predict(batch.x_t, t, batch.conditioning, batch.guidance_scale))
    registered = {name for name, _ in critic.named_parameters()}
    assert registered == {f"unet.{name}" for name, _ in critic.unet.named_parameters()} | {
        f"head.{name}" for name, _ in critic.head.named_parameters()
    }


def test_a_new_critic_is_the_teacher(tiny_directory: Path) -> None:
    problem = dmd2_problem(tiny_directory, "objective.gan=null")
    critic = create_networks(problem.config, problem)[FAKE_SCORE]
    assert isinstance(critic, Critic)
    assert critic.head is None
    batch = batch_of(problem)
    t = torch.tensor([5, 300, 700, 999])
    with torch.no_grad():
        told = Denoiser(critic, problem.teacher.schedule, "epsilon").predict(
            batch.x_t, t, batch.conditioning, batch.guidance_scale
        )
        assert torch.allclose(told, problem.teacher.denoiser().predict(batch.x_t, t, batch.conditioning), atol=1e-6)


def only(networks: dict[str, nn.Module], trained: str) -> None:
    for role, network in networks.items():
        network.zero_grad(set_to_none=True)
        network.requires_grad_(role == trained)


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_a_phase_moves_its_own_role_alone(tiny_directory: Path, features: str) -> None:
    problem = dmd2_problem(tiny_directory, f"objective.gan.features={features}")
    objective, networks = objective_of(problem)
    perturbed(networks[STUDENT], seed=1)
    batch = batch_of(problem)
    for phase in objective.phases(0):
        only(networks, phase.role)
        phase.loss(batch).loss.backward()
        for role, network in networks.items():
            grads = [parameter.grad for parameter in network.parameters()]
            if role == phase.role:
                assert all(grad is not None and bool(grad.abs().max() > 0) for grad in grads), role
            else:
                assert all(grad is None for grad in grads), role
        assert all(parameter.grad is None for parameter in problem.teacher.unet.parameters())


def test_the_discriminators_gradient_reaches_the_student(tiny_directory: Path) -> None:
    """With a matching loss that is silent, real and fake being one network, what is left is the discriminator's."""
    problem = dmd2_problem(tiny_directory, "teacher.guidance={min: 1, max: 1}", "objective.gan.generator_weight=2")
    networks = create_networks(problem.config, problem)
    objective = create_objective(problem.config, problem, networks)
    assert isinstance(objective, DistributionMatchingObjective)
    only(networks, STUDENT)
    batch = batch_of(problem)
    batch = replace(batch, guidance_scale=torch.ones(4))
    output = objective.generator_loss(batch)
    assert float(output.metrics["matching"]) < 1e-6
    assert output.loss.item() == pytest.approx(2 * float(output.metrics["gan"]), rel=1e-4)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in networks[STUDENT].parameters())


def test_losses_of_a_logistic_discriminator(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dmd2_problem(tiny_directory, "objective.gan.max_timestep=0")
    objective, _ = objective_of(problem)
    logits = iter([torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([1.5, -0.5, 0.0, 3.0])])
    inputs: list[Tensor] = []

    class Told:
        def predict(self, x: Tensor, t: Tensor, *_: Any) -> Tensor:
            assert t.tolist() == [0, 0, 0, 0]
            inputs.append(x)
            return next(logits).unsqueeze(1)

    monkeypatch.setattr(objective, "_discriminator", Told())
    batch = batch_of(problem)
    objective.phases(0)
    output = objective.critic_loss(batch)
    fake, real = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([1.5, -0.5, 0.0, 3.0])
    wanted = -torch.log(1 - torch.sigmoid(fake)) - torch.log(torch.sigmoid(real))
    assert float(output.metrics["gan"]) == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(
        float(output.metrics["denoising"]) + 1e-2 * wanted.mean().item(), rel=1e-5
    )
    assert float(output.metrics["accuracy"]) == pytest.approx((1 / 4 + 2 / 4) / 2)
    data = RealData(problem.forward_data(seed=1_000_003), problem.encoder, rows=4)
    assert torch.equal(inputs[1], data.next(4)[0])  # not noised, and in the order of the worker's own seed


def test_the_data_go_on_where_a_stopped_run_was(tiny_directory: Path) -> None:
    problem = dmd2_problem(tiny_directory)

    def stream() -> RealData:
        return RealData(problem.forward_data(seed=9), problem.encoder, rows=5)

    whole, resumed = stream(), stream()
    rows = [whole.next(5) for _ in range(9)]
    resumed.seek(7)
    for x_0, conditioning in rows[7:]:
        again = resumed.next(3), resumed.next(2)
        assert torch.equal(torch.cat([part[0] for part in again]), x_0)
        assert torch.equal(torch.cat([part[1].embeddings for part in again]), conditioning.embeddings)


def test_the_discriminator_learns_to_tell(tiny_directory: Path) -> None:
    """Trained on its loss alone, the head separates the student's latents from the data's."""
    torch.manual_seed(0)
    problem = dmd2_problem(tiny_directory, "objective.gan.critic_weight=1", "objective.gan.max_timestep=0.3")
    objective, networks = objective_of(problem)
    only(networks, FAKE_SCORE)
    optimizer = torch.optim.Adam(networks[FAKE_SCORE].parameters(), lr=3e-3)
    losses = []
    for update in range(40):
        objective.phases(update)
        output = objective.critic_loss(batch_of(problem))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.metrics["gan"]))
    chance = 2 * float(softplus(torch.tensor(0.0)))
    assert sum(losses[-10:]) / 10 < 0.7 * chance
