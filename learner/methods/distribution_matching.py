"""Distribution matching: the student's samples move where the teacher finds them likelier than the critic does.

DMD2 (Yin et al. 2024). A generated x is noised to x_t; with x_real the guided teacher's and x_fake the critic's x_0,

    gradient = (x_fake - x_real) / mean |x - x_real|,    loss = 1/2 |x - stop(x - gradient)|^2,

whose derivative in x is that gradient (DMD, Yin et al. 2023, Eq. 7 and 8). The critic learns, in every update, to
denoise what the generator makes, and its head to tell that from data; the generator moves in every n-th. Several steps
are trained at once: x is the student's x_0 at a grid time, reached by backward simulation (its own x_0, noised afresh
down the grid) or, as DDIL has it, by whatever rollout the sampling prior drew.

Reflected diffusion folds the x_0 of teacher and critic into the support. A generated sample is projected on it, with a
straight-through gradient, and a penalty brings back what lies outside: a fold would turn the gradient there round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddil_dist.config import RunConfig
from ddil_dist.diffusion.parameterization import PredictionType, prediction_from_x_0
from ddil_dist.diffusion.thresholding import Threshold, outside, straight_through
from ddil_dist.methods import FAKE_SCORE, DistributionMatching, Dmd2, Gan
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.policy import StudentPolicy, TeacherPolicy
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from ddil_dist.types import StateSource
from learner.methods.base import STUDENT, ObjectiveOutput, Phase
from learner.methods.critic import Critic, discriminator, noised
from learner.methods.real_data import RealData

REAL_DATA_SEED = 1_000_003
"""Apart from the seeds of the forward-diffused data's streams, which are a run's seed and a worker's rank."""


def create_roles(config: RunConfig, problem: ImitationProblem) -> dict[str, nn.Module]:
    """The critic: the teacher's network, told the guidance scale as the student is, with a discriminator's head if the
    method has one."""
    method = config.objective
    gan = method.gan if isinstance(method, Dmd2) else None
    frozen = problem.teacher.unet if gan is not None and gan.features == "teacher" else None
    unet = problem.new_networks(FAKE_SCORE)[FAKE_SCORE]
    critic = Critic(unet, discriminate=gan is not None, frozen=frozen, latent_side=problem.teacher.latent_shape[1])
    return {FAKE_SCORE: critic.to(problem.device)}


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int
) -> DistributionMatchingObjective:
    """DMD2's, with data of its own for the discriminator."""
    method = config.objective
    assert isinstance(method, Dmd2)
    real = None
    if method.gan is not None:
        rows = config.learner.worker_batch_size
        real = RealData(problem.forward_data(seed=seed + REAL_DATA_SEED), problem.encoder, rows=rows)
    return DistributionMatchingObjective(
        method,
        student=problem.student_policy(networks[STUDENT]),
        scores=ScoreDifference.create(method, config, problem, networks),
        critic=problem.teacher_denoiser(networks[FAKE_SCORE]),
        real=real,
        projection=config.thresholding.projection(),
    )


class ScoreDifference:
    """What DMD and DMD2 share: the gradient at generated samples, and the critic's denoising loss."""

    def __init__(
        self, config: DistributionMatching, *, teacher: TeacherPolicy, critic: Denoiser, threshold: Threshold
    ) -> None:
        self._config = config
        self._teacher = teacher
        self._critic = critic
        self._threshold = threshold
        self._levels = config.min_timestep, config.max_timestep

    @classmethod
    def create(
        cls,
        method: DistributionMatching,
        config: RunConfig,
        problem: ImitationProblem,
        networks: Mapping[str, nn.Module],
    ) -> ScoreDifference:
        """Between the problem's teacher and the critic among `networks`."""
        critic, threshold = problem.teacher_denoiser(networks[FAKE_SCORE]), config.thresholding.threshold()
        return cls(method, teacher=problem.teacher_policy(), critic=critic, threshold=threshold)

    def matching(self, x: Tensor, batch: States[Tensor]) -> tuple[Tensor, Tensor]:
        """By sample, [B]: the generator's loss at x [B, C, H, W], with a graph; and the mean magnitude of its gradient.

        x: generated latents, with a graph.
        """
        schedule = self._critic.schedule
        low, high = (int(share * schedule.num_timesteps) for share in self._levels)
        t = uniform_timesteps(len(x), low, min(high + 1, schedule.num_timesteps), x.device)
        with torch.no_grad():
            x_t, _ = noised(x.detach(), t, schedule)
            told = (batch.conditioning, batch.guidance_scale)
            real = self._teacher.predict_x_0(x_t, t, *told)
            fake = self._threshold(self._critic.x_0(self._critic.predict(x_t, t, *told), x_t, t))
            gradient = matching_gradient(x, real, fake)
        loss = 0.5 * (x.double() - (x.double() - gradient).detach()).square().flatten(1).mean(1)
        return loss.float(), gradient.abs().flatten(1).mean(1).float()

    def denoising(self, x: Tensor, batch: States[Tensor]) -> Tensor:
        """The critic's loss by sample, [B], at generated latents x [B, C, H, W] noised to any timestep."""
        schedule = self._critic.schedule
        t = uniform_timesteps(len(x), 0, schedule.num_timesteps, x.device)
        x_t, _ = noised(x, t, schedule)
        prediction = self._critic.predict(x_t, t, batch.conditioning, batch.guidance_scale)
        own = self._critic.prediction_type
        kind: PredictionType = own if self._config.critic_target == "prediction" else self._config.critic_target
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if kind != own:
            x_0 = self._critic.x_0(prediction, x_t, t)
            prediction = prediction_from_x_0(x_0, x_t, alpha, sigma, prediction_type=kind)
        target = prediction_from_x_0(x, x_t, alpha, sigma, prediction_type=kind)
        return (prediction - target).square().flatten(1).mean(1)


class Samples:
    """What the generator has made in its phase of an update, for the critic's phase of it, micro-batch by micro-batch.

    DMD2's critic learns from the very samples that the generator has just learnt by; making them anew would cost
    another pass through the student. Where the generator had no turn, they are made.
    """

    def __init__(self) -> None:
        self._made: deque[Tensor] = deque()

    def clear(self) -> None:
        """A new update begins, or a phase of it anew."""
        self._made.clear()

    def keep(self, x: Tensor) -> None:
        """x: [B, C, H, W], of the next micro-batch."""
        self._made.append(x.detach())

    @torch.no_grad()
    def take(self, make: Callable[[], Tensor]) -> Tensor:
        """The next micro-batch's, [B, C, H, W] without a graph."""
        return self._made.popleft() if self._made else make()


class DistributionMatchingObjective:
    """DMD2's phases: the generator in every n-th update, the critic in all of them (or in the others)."""

    def __init__(
        self,
        config: Dmd2,
        *,
        student: StudentPolicy,
        scores: ScoreDifference,
        critic: Denoiser,
        real: RealData | None,
        projection: Threshold,
    ) -> None:
        assert (real is None) == (config.gan is None), "a discriminator needs data, and nothing else does"
        self._config = config
        self._student = student
        self._scores = scores
        self._discriminator = discriminator(critic)
        self._real = real
        self._schedule = critic.schedule
        self._grid = torch.tensor(student.grid.student)
        self._projection = projection
        self._samples = Samples()

    def phases(self, update: int) -> Sequence[Phase]:
        """The generator first, where it is its turn, so that it meets the critic of the update before, as in DMD2."""
        generator = update % self._config.generator_every == 0
        critic = self._config.critic == "every" or not generator
        self.retry(update)
        return [Phase(STUDENT, self.generator_loss)] * generator + [Phase(FAKE_SCORE, self.critic_loss)] * critic

    def retry(self, update: int) -> None:
        """Forget the samples, which are of other micro-batches, and go back to the data that the update began with."""
        self._samples.clear()
        if self._real is not None:
            self._real.seek(self._critic_turns(update))

    def after_update(self, update: int) -> None:
        """Nothing."""

    @property
    def state(self) -> Mapping[str, nn.Module]:
        """Nothing beside student and critic."""
        return {}

    def generator_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's."""
        raw = self.generate(batch)
        x = straight_through(raw, self._projection)
        self._samples.keep(x)
        matching, gradient = self._scores.matching(x, batch)
        distance, share = outside(raw, self._projection)
        loss = matching + self._config.outside_weight * distance
        metrics: dict[str, Tensor | float] = {
            "matching": matching.detach().mean(),
            "gradient": gradient.mean(),
            "outside": share.mean(),
        }
        if self._config.gan is not None:
            fooled = softplus(-self._logits(x, batch.conditioning, batch.guidance_scale, self._config.gan))
            loss = loss + self._config.gan.generator_weight * fooled
            metrics["gan"] = fooled.detach().mean()
        return ObjectiveOutput(loss=loss.mean(), per_sample=loss.detach(), metrics=metrics)

    def critic_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The critic's: denoising, and telling generated latents from data."""
        x = self._samples.take(lambda: self._projection(self.generate(batch)))
        loss = self._scores.denoising(x, batch)
        metrics: dict[str, Tensor | float] = {"denoising": loss.detach().mean()}
        if self._config.gan is not None and self._real is not None:
            x_0, conditioning = self._real.next(len(batch))
            on_fake = self._logits(x, batch.conditioning, batch.guidance_scale, self._config.gan)
            on_real = self._logits(x_0, conditioning, batch.guidance_scale, self._config.gan)
            told_apart = softplus(on_fake) + softplus(-on_real)
            loss = loss + self._config.gan.critic_weight * told_apart
            metrics["gan"] = told_apart.detach().mean()
            metrics["accuracy"] = 0.5 * ((on_fake < 0).float().mean() + (on_real > 0).float().mean())
        return ObjectiveOutput(loss=loss.mean(), per_sample=loss.detach(), metrics=metrics)

    def generate(self, batch: States[Tensor]) -> Tensor:
        """The student's x_0 [B, C, H, W], not projected yet, at each sample's grid time, with a graph."""
        if self._config.generator_input == "backward_simulation":
            x_t = self._simulated(batch)
        else:
            x_t = from_pure_noise(batch)
        t = self._grid.to(x_t.device)[batch.step_index]
        return self._student.estimate_x_0(x_t, t, batch.conditioning, batch.guidance_scale)

    @torch.no_grad()
    def _simulated(self, batch: States[Tensor]) -> Tensor:
        """x_t [B, C, H, W] at each sample's grid time: from pure noise by the student's own x_0, noised afresh."""
        x = torch.randn(batch.x_t.shape).to(batch.x_t.device)
        for step in range(len(self._grid) - 1):
            further = batch.step_index > step
            # Workers that share a network must all call it equally often: where none goes further, one row is asked in
            # vain.
            rows = further.nonzero().squeeze(1) if bool(further.any()) else torch.zeros_like(batch.step_index[:1])
            t = torch.full_like(rows, int(self._grid[step]))
            x_0 = self._student.predict_x_0(x[rows], t, batch.conditioning.select(rows), batch.guidance_scale[rows])
            renoised, _ = noised(x_0, torch.full_like(rows, int(self._grid[step + 1])), self._schedule)
            if bool(further.any()):
                x[rows] = renoised
        return x

    def _logits(self, x: Tensor, conditioning: Conditioning, guidance_scale: Tensor, gan: Gan) -> Tensor:
        """The discriminator's [B] at latents [B, C, H, W], noised to a timestep of its own each."""
        levels = int(gan.max_timestep * self._schedule.num_timesteps)
        t = uniform_timesteps(len(x), 0, max(1, levels), x.device)
        x_t = noised(x, t, self._schedule)[0] if levels else x
        return self._discriminator.predict(x_t, t, conditioning, guidance_scale).squeeze(1)

    def _critic_turns(self, update: int) -> int:
        """How often the critic has learnt before an update."""
        every = self._config.generator_every
        return update if self._config.critic == "every" else update - (update + every - 1) // every


def from_pure_noise(batch: States[Tensor]) -> Tensor:
    """The batch's x_t [B, C, H, W], but forward states at the grid's first point are pure noise, as in DMD2.

    Sampling starts from noise alone, and diffused data at the last timestep still shows a trace of the data.
    """
    first = (batch.step_index == 0) & (batch.source == int(StateSource.FORWARD))
    noise = torch.randn(batch.x_t.shape).to(batch.x_t)
    return torch.where(first.view(-1, 1, 1, 1), noise, batch.x_t)


def matching_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(x_fake - x_real) / mean |x - x_real|, [B, C, H, W] float64; 0 where that is not a number.

    x, real, fake: [B, C, H, W]. The mean is each sample's own, so that no row depends on the batch it is in.
    """
    x, real, fake = x.double(), real.double(), fake.double()
    mean = (x - real).abs().mean((1, 2, 3), keepdim=True)
    return torch.nan_to_num((fake - real) / mean, nan=0.0, posinf=0.0, neginf=0.0)


def uniform_timesteps(num: int, low: int, high: int, device: torch.device) -> Tensor:
    """[num] int64 in [low, high), drawn on the CPU, so that a seed means the same anywhere."""
    return torch.randint(low, high, (num,)).to(device)
