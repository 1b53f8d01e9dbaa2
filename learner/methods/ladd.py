"""Latent adversarial distillation (Sauer et al. 2024), with ADD's distance to the teacher (Sauer et al. 2023, Eq. 1-5).

x^ is the student's x_0 at the batch's states. Noised to a t whose logit is normal, it is told from data that is noised
alike by heads D_k on the frozen teacher's features F_k, all blocks of its first half:

    generator       -mean_k D_k(F_k(x^_t)) + 2.5 c(t') |x^ - sg[x_teacher(x^_t')]|^2,   t' uniform
    discriminator   mean_k relu(1 + D_k(F_k(x^_t))) + relu(1 - D_k(F_k(x_t))) + r1 |dD_k / dF_k(x_t)|^2

A head is told noise level, sizes and caption, as a projection discriminator is. The generator learns first in every
update, and the discriminator by the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddil_dist.config import RunConfig
from ddil_dist.methods import DISCRIMINATOR, Ladd
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.models.lora import inner_unet
from ddil_dist.policy import StudentPolicy, TeacherPolicy
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods.adversarial import AdversarialObjective
from learner.methods.base import STUDENT, ObjectiveOutput
from learner.methods.critic import first_half, noised
from learner.methods.distribution_matching import REAL_DATA_SEED, Samples, from_pure_noise, uniform_timesteps
from learner.methods.real_data import RealData


def create_roles(config: RunConfig, problem: ImitationProblem) -> dict[str, nn.Module]:
    """Heads on the problem's teacher."""
    return {DISCRIMINATOR: TeacherHeads(problem.teacher.unet).to(problem.device)}


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int
) -> LaddObjective:
    """With data of its own for the discriminator."""
    method = config.objective
    assert isinstance(method, Ladd)
    data = problem.forward_data(seed=seed + REAL_DATA_SEED)
    return LaddObjective(
        method,
        student=problem.student_policy(networks[STUDENT]),
        teacher=problem.teacher_policy(),
        discriminator=problem.teacher_denoiser(networks[DISCRIMINATOR]),
        real=RealData(data, problem.encoder, rows=config.learner.worker_batch_size),
    )


class TeacherHeads(nn.Module):
    """Called as the teacher's network, it gives the heads' answers [B, K]; with `penalise` also the gradient penalty
    [B, 1], joined to them. The teacher is frozen, and no part of this module."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.config = teacher.config
        self._teacher = (teacher,)  # in a tuple, nn.Module does not register it
        unet: Any = inner_unet(teacher)
        widths = list(self.config["block_out_channels"])
        if unet.mid_block is not None:
            widths.append(widths[-1])
        told = int(unet.time_embedding.linear_2.out_features)
        text = int(self.config["cross_attention_dim"])
        self.heads = nn.ModuleList(Head(width, told, text) for width in widths)

    def enable_gradient_checkpointing(self) -> None:
        """Nothing: a head keeps little."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *, penalise: bool = False, **told: Any
    ) -> tuple[Tensor]:
        with torch.autocast(sample.device.type, enabled=False):
            features, time = first_half(inner_unet(self._teacher[0]), sample, timestep, encoder_hidden_states, **told)
        features = [part.detach().requires_grad_() if penalise else part for part in features]
        caption = encoder_hidden_states.float().mean(1)
        answers = [head(part.float(), time.float(), caption) for head, part in zip(self.heads, features, strict=True)]
        if not penalise:
            return (torch.stack(answers, 1),)
        gradients = torch.autograd.grad(sum(answer.sum() for answer in answers), features, create_graph=True)
        penalty = torch.stack([gradient.float().square().flatten(1).sum(1) for gradient in gradients], 1).mean(1)
        return (torch.cat([torch.stack(answers, 1), penalty.unsqueeze(1)], 1),)


class Head(nn.Module):
    """One answer [B] of features [B, C, h, w], the mean of its answers at their positions, given time and caption."""

    def __init__(self, channels: int, time: int, text: int) -> None:
        super().__init__()
        width = max(16, channels // 2)
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.answer = nn.Conv2d(width, 1, 1)
        self.time = nn.Linear(time, width)
        self.text = nn.Linear(text, width)

    def forward(self, features: Tensor, time: Tensor, caption: Tensor) -> Tensor:
        told = self.time(time) + self.text(caption)
        found = nn.functional.silu(self.features(features))
        projected = (found * told[:, :, None, None]).sum(1) / found.shape[1] ** 0.5
        answers: Tensor = self.answer(found).squeeze(1) + projected
        return answers.mean((1, 2))


class LaddObjective(AdversarialObjective):
    """Its two losses."""

    def __init__(
        self, config: Ladd, *, student: StudentPolicy, teacher: TeacherPolicy, discriminator: Denoiser, real: RealData
    ) -> None:
        super().__init__(real)
        self._config = config
        self._student = student
        self._teacher = teacher
        self._heads = discriminator
        self._schedule = discriminator.schedule
        self._grid = torch.tensor(student.grid.student)
        self._samples = Samples()

    def forget(self) -> None:
        """See `AdversarialObjective`."""
        self._samples.clear()

    def generator_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's."""
        x = self._generate(batch)
        self._samples.keep(x)
        fooled = -self._answers(x, batch.conditioning, batch.guidance_scale).mean(1)
        metrics: dict[str, Tensor | float] = {"gan": fooled.detach().mean()}
        loss = fooled
        if self._config.distillation_weight:
            distance = self._distance(x, batch)
            metrics["distillation"] = distance.detach().mean()
            loss = loss + self._config.distillation_weight * distance
        return ObjectiveOutput(loss=loss.mean(), per_sample=loss.detach(), metrics=metrics)

    def discriminator_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The heads': hinge on the student's samples and on data, and R1 at data."""
        x = self._samples.take(lambda: self._generate(batch))
        x_0, conditioning = self._real.next(len(batch))
        on_fake = self._answers(x, batch.conditioning, batch.guidance_scale)
        *on_real, penalty = self._answers(x_0, conditioning, batch.guidance_scale, penalise=True).unbind(1)
        real = torch.stack(on_real, 1)
        hinge = (1 + on_fake).relu().mean(1) + (1 - real).relu().mean(1)
        loss = hinge + self._config.r1_weight * penalty
        metrics: dict[str, Tensor | float] = {
            "hinge": hinge.detach().mean(),
            "r1": penalty.detach().mean(),
            "accuracy": 0.5 * ((on_fake < 0).float().mean() + (real > 0).float().mean()),
        }
        return ObjectiveOutput(loss=loss.mean(), per_sample=loss.detach(), metrics=metrics)

    def _generate(self, batch: States[Tensor]) -> Tensor:
        t = self._grid.to(batch.x_t.device)[batch.step_index]
        return self._student.estimate_x_0(from_pure_noise(batch), t, batch.conditioning, batch.guidance_scale)

    def _distance(self, x: Tensor, batch: States[Tensor]) -> Tensor:
        """c(t) |x - x_teacher(x_t)|^2 by sample, [B], the mean over elements, at a uniform t."""
        t = uniform_timesteps(len(x), 0, self._schedule.num_timesteps, x.device)
        x_t, _ = noised(x.detach(), t, self._schedule)
        target = self._teacher.predict_x_0(x_t, t, batch.conditioning, batch.guidance_scale)
        alpha, sigma = (part.flatten() for part in (self._schedule.alpha(t), self._schedule.sigma(t)))
        scale = alpha if self._config.distillation_scale == "alpha" else alpha * sigma
        return scale * (x - target).square().flatten(1).mean(1)

    def _answers(
        self, x: Tensor, conditioning: Conditioning, guidance_scale: Tensor, *, penalise: bool = False
    ) -> Tensor:
        """The heads' [B, K] at latents [B, C, H, W], each noised to a timestep of its own."""
        logit = self._config.noise_mean + self._config.noise_std * torch.randn((len(x),)).to(x.device)
        t = (logit.sigmoid() * self._schedule.num_timesteps).long().clamp(max=self._schedule.num_timesteps - 1)
        x_t, _ = noised(x, t, self._schedule)
        heads = Denoiser(Penalised(self._heads.unet), self._schedule, "sample") if penalise else self._heads
        return heads.predict(x_t, t, conditioning, guidance_scale)


class Penalised(nn.Module):
    """The heads, perhaps wrapped for data parallelism, called for their penalty, too."""

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        self.module = heads

    def forward(self, *arguments: Any, **told: Any) -> Any:
        return self.module(*arguments, penalise=True, **told)
