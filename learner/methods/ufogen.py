"""UFOGen (Xu et al. 2023): a diffusion GAN (Eq. 5 to 8), with x_0 from one call and noise from the forward process.

Data x_0 is noised to a grid time t; x^ is the student's x_0 there, and both are noised to the next grid point s, each
with noise of its own. The discriminator, the first half of a copy of the teacher's network with a head, is asked at s:

    generator       softplus(-D(x^_s, s)) + lambda |x^ - x_0|^2
    discriminator   softplus(D(x^_s, s)) + softplus(-D(x_s, s))

At the grid's end s has no noise, and is told as timestep 0. Both learn in every update, by the same data and samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddil_dist.config import RunConfig
from ddil_dist.methods import DISCRIMINATOR, Ufogen
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.models.lora import inner_unet
from ddil_dist.models.student import copy_network
from ddil_dist.policy import StudentPolicy
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from ddil_dist.types import FINAL_TIMESTEP
from learner.methods.adversarial import AdversarialObjective
from learner.methods.base import STUDENT, ObjectiveOutput
from learner.methods.critic import Critic, discriminator, noised
from learner.methods.distribution_matching import REAL_DATA_SEED
from learner.methods.real_data import RealData


def create_roles(config: RunConfig, problem: ImitationProblem) -> dict[str, nn.Module]:
    """The discriminator, without the half of the network that it would never run."""
    unet = copy_network(inner_unet(problem.teacher.unet), embeds_guidance=False)
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), nn.Identity(), nn.Identity()
    critic = Critic(unet, discriminate=True, latent_side=problem.teacher.latent_shape[1])
    return {DISCRIMINATOR: critic.to(problem.device)}


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int
) -> UfogenObjective:
    """With the data that it makes its states of."""
    method = config.objective
    assert isinstance(method, Ufogen)
    data = problem.forward_data(seed=seed + REAL_DATA_SEED)
    return UfogenObjective(
        method,
        student=problem.student_policy(networks[STUDENT]),
        critic=problem.teacher_denoiser(networks[DISCRIMINATOR]),
        real=RealData(data, problem.encoder, rows=config.learner.worker_batch_size),
    )


@dataclass(frozen=True)
class _Made:
    """What the generator's phase of an update leaves for the discriminator's, of one micro-batch."""

    x: Tensor
    x_0: Tensor
    conditioning: Conditioning


class UfogenObjective(AdversarialObjective):
    """Its two losses."""

    def __init__(self, config: Ufogen, *, student: StudentPolicy, critic: Denoiser, real: RealData) -> None:
        super().__init__(real)
        self._config = config
        self._student = student
        self._discriminator = discriminator(critic)
        self._schedule = critic.schedule
        self._points = torch.tensor((*student.grid.student, FINAL_TIMESTEP))
        self._made: deque[_Made] = deque()

    def forget(self) -> None:
        """See `AdversarialObjective`."""
        self._made.clear()

    def generator_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's."""
        made = self._generate(batch)
        self._made.append(_Made(made.x.detach(), made.x_0, made.conditioning))
        fooled = softplus(-self._logits(made.x, made.conditioning, batch))
        distance = (made.x - made.x_0).square().flatten(1).mean(1)
        loss = fooled + self._config.reconstruction_weight * distance
        metrics: dict[str, Tensor | float] = {
            "gan": fooled.detach().mean(),
            "reconstruction": distance.detach().mean(),
        }
        return ObjectiveOutput(loss=loss.mean(), per_sample=loss.detach(), metrics=metrics)

    def discriminator_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The discriminator's: the student's samples against the data that they were made of."""
        with torch.no_grad():
            made = self._made.popleft() if self._made else self._generate(batch)
        on_fake = self._logits(made.x, made.conditioning, batch)
        on_real = self._logits(made.x_0, made.conditioning, batch)
        loss = softplus(on_fake) + softplus(-on_real)
        metrics: dict[str, Tensor | float] = {
            "gan": loss.detach().mean(),
            "accuracy": 0.5 * ((on_fake < 0).float().mean() + (on_real > 0).float().mean()),
        }
        return ObjectiveOutput(loss=loss.mean(), per_sample=loss.detach(), metrics=metrics)

    def _generate(self, batch: States[Tensor]) -> _Made:
        """The student's x_0 of noised data, with a graph; of a batch only positions and guidance scales are used."""
        x_0, conditioning = self._real.next(len(batch))
        t = self._points.to(x_0.device)[batch.step_index]
        x_t, noise = noised(x_0, t, self._schedule)
        x_t = torch.where((batch.step_index == 0).view(-1, 1, 1, 1), noise, x_t)  # sampling begins at noise alone
        return _Made(self._student.estimate_x_0(x_t, t, conditioning, batch.guidance_scale), x_0, conditioning)

    def _logits(self, x: Tensor, conditioning: Conditioning, batch: States[Tensor]) -> Tensor:
        """The discriminator's [B] at latents [B, C, H, W], noised to the grid point after each sample's own."""
        s = self._points.to(x.device)[batch.step_index + 1]
        x_s, _ = noised(x, s, self._schedule)
        return self._discriminator.predict(x_s, s.clamp(min=0), conditioning, batch.guidance_scale).squeeze(1)
