"""Loops with nothing around them: what the learner's updates are measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddil_dist.config import OptimizerConfig, RunConfig
from ddil_dist.diffusion.ddim import ddim_step
from ddil_dist.diffusion.guidance import guidance_embedding
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods import create_objective

CLIP = 1.0


class BareLoop:
    """Forward, backward, clip, AdamW, average: the same network and loss on batches that lie ready in memory."""

    waited_s = 0.0

    def __init__(self, config: RunConfig, problem: ImitationProblem, batches: Sequence[States[torch.Tensor]]) -> None:
        self._network = problem.new_student().train()
        objective = create_objective(config, problem, {"student": self._network})
        (phase,) = objective.phases(0)
        self._loss = phase.loss
        self._optimizer = adamw(self._network, config.learner.optimizer)
        self._parameters = list(self._network.parameters())
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._decay = config.learner.ema_decay
        self._batches = batches
        self._done = 0

    def update(self) -> None:
        """One update."""
        self._loss(self._batches[self._done % len(self._batches)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - self._decay)
        self._done += 1


class LcmLoop:
    """An update of latent consistency distillation, step for step what diffusers' training example does in one.

    Encode images by the VAE; noise them to a random point of the solver's grid; the student there; the teacher there,
    with the prompt and without, in two calls; one DDIM step; the target network at its end; pseudo-Huber; AdamW; move
    the target. Images and encoded prompts lie ready in memory.
    """

    waited_s = 0.0

    def __init__(self, config: RunConfig, problem: ImitationProblem, images: Tensor, embeddings: Tensor) -> None:
        assert config.objective.type == "consistency"
        self._objective = config.objective
        self._problem = problem
        self._schedule = problem.teacher.schedule
        self._rows = config.learner.batch_size
        self._images, self._embeddings = images, embeddings
        self._null = problem.encoder.encode([""]).embeddings
        self._student = problem.new_student().train()
        self._target = problem.new_student().requires_grad_(False)
        self._teacher = problem.teacher.unet
        self._optimizer = adamw(self._student, config.learner.optimizer)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda update: 1.0)
        self._dim = int(self._student.config["time_cond_proj_dim"])  # type: ignore[index]
        self._skip = self._schedule.num_timesteps // self._objective.solver_steps
        self._guidance = config.teacher.guidance

    def update(self) -> None:
        """One update."""
        teacher, schedule, rows = self._problem.teacher, self._schedule, self._rows
        chosen = torch.randint(len(self._images), (rows,))
        x_0 = teacher.encode_images(self._images[chosen], torch.Generator())
        embeddings = self._embeddings[chosen]
        noise = torch.randn_like(x_0)
        t = torch.randint(1, self._objective.solver_steps, (rows,)) * self._skip + self._skip - 1
        s = t - self._skip
        x_t = schedule.add_noise(x_0, noise, t)
        low, high = self._guidance.min, self._guidance.max
        scale = low + (high - low) * torch.rand(rows)
        embedded = guidance_embedding(scale, self._dim)
        output = self._student(x_t, t, embeddings, timestep_cond=embedded).sample
        predicted = self._consistent(x_t, self._x_0(output, x_t, t), t)
        with torch.no_grad():
            conditional = self._teacher(x_t, t, embeddings).sample
            unconditional = self._teacher(x_t, t, self._null.expand(rows, -1, -1)).sample
            guided = unconditional + scale.view(-1, 1, 1, 1) * (conditional - unconditional)
            x_s = ddim_step(x_t, self._x_0(guided, x_t, t), t, s, schedule=schedule)
            output = self._target(x_s, s, embeddings, timestep_cond=embedded).sample
            target = self._consistent(x_s, self._x_0(output, x_s, s), s)
        c = self._objective.huber_c
        loss = (torch.sqrt((predicted.float() - target.float()) ** 2 + c**2) - c).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), CLIP)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        decay = self._objective.target_decay
        for mine, theirs in zip(self._target.parameters(), self._student.parameters(), strict=True):
            mine.detach().mul_(decay).add_(theirs.detach(), alpha=1 - decay)
        loss.detach().item()  # the example logs it in every step

    def _x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self._problem.student_denoiser(self._student).x_0(output, x_t, t)

    @staticmethod
    def _consistent(x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        scaled = (10.0 * t).view(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25) * x_t + scaled / torch.sqrt(scaled**2 + 0.25) * x_0


def adamw(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW as the learner's."""
    return torch.optim.AdamW(network.parameters(), config.learning_rate, config.betas, weight_decay=config.weight_decay)
