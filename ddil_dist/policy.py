"""Teacher and student as policies: who makes the next transition of a trajectory. The one code for rollouts and losses.

State: (prompt, t, x_t) at a position of the student grid; action: the next latent. The expert makes K guided DDIM
steps where the student makes one (`ddil_dist.diffusion.grid`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_dist.diffusion.consistency import LCM_BOUNDARY, multistep_indices
from ddil_dist.diffusion.ddim import ddim_step
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.guidance import guide
from ddil_dist.diffusion.thresholding import Threshold
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.types import FINAL_TIMESTEP


class TeacherPolicy:
    """The expert: classifier-free guidance, thresholding, K DDIM substeps to the student's next grid point.

    guides: whether it is ever asked for a scale other than 1, which needs no unconditional branch.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        null: Conditioning,
        threshold: Threshold,
        grid: TrajectoryGrid,
        *,
        guides: bool = True,
    ) -> None:
        self._denoiser = denoiser
        self._null = null
        self._guides = guides
        self._threshold = threshold
        self.grid = grid
        self._table = grid.teacher_table().to(null.embeddings.device)

    @torch.no_grad()
    def predict_x_0(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """Guided, thresholded x_0 [B, C, H, W]; both branches in one network call of 2 B rows. t, scale: [B].

        A teacher that is itself distilled, and told the scale, is guided in one call of B rows; so is one that is only
        asked for scale 1.
        """
        if self._denoiser.embeds_guidance or not self._guides:
            prediction = self._denoiser.predict(x_t, t, conditioning, guidance_scale)
            return self._threshold(self._denoiser.x_0(prediction, x_t, t))
        num = len(x_t)
        both = self._denoiser.predict(
            torch.cat([x_t, x_t]),
            torch.cat([t, t]),
            Conditioning.cat([self._null.expand(num), conditioning]),
        )
        unconditional, conditional = both.chunk(2)
        guided = guide(conditional, unconditional, guidance_scale)
        return self._threshold(self._denoiser.x_0(guided, x_t, t))

    @torch.no_grad()
    def substep(
        self, x: Tensor, step_index: Tensor, substep: Tensor, conditioning: Conditioning, guidance_scale: Tensor
    ) -> Tensor:
        """One teacher step, the `substep`-th [B] of the student's step `step_index` [B]."""
        t, s = self._table[step_index, substep], self._table[step_index, substep + 1]
        x_0 = self.predict_x_0(x, t, conditioning, guidance_scale)
        return ddim_step(x, x_0, t, s, schedule=self._denoiser.schedule)

    def solve(self, x_t: Tensor, step_index: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """The expert's answer at x_t [B, C, H, W] on the student grid: x_s at the next grid point, K steps away."""
        for k in range(self.grid.substeps):
            x_t = self.substep(x_t, step_index, torch.full_like(step_index, k), conditioning, guidance_scale)
        return x_t


class StudentPolicy:
    """The learner's policy: one network call, guidance embedded, one transition. This one's is a DDIM step.

    The two below differ from it in how they estimate x_0 and in how they go on from it.
    """

    uses_noise: bool = False
    """Whether a transition needs fresh noise; where it does not, `step` takes None."""

    def __init__(self, denoiser: Denoiser, grid: TrajectoryGrid, device: torch.device) -> None:
        self._denoiser = denoiser
        self.grid = grid
        self._points = torch.tensor((*grid.student, FINAL_TIMESTEP), device=device)

    def path(self, num_steps: int | None = None) -> tuple[int, ...]:
        """The grid positions where a sampler of `num_steps` (None: the whole grid's) calls the network."""
        assert num_steps is None or num_steps == self.grid.num_steps, "a DDIM student is trained for its grid's steps"
        return tuple(range(self.grid.num_steps))

    def predict_x_0(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """The x_0 [B, C, H, W] that a transition goes on from: here the network's, as in stock pipelines."""
        return self.estimate_x_0(x_t, t, conditioning, guidance_scale)

    def estimate_x_0(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """The network's x_0 [B, C, H, W], as it is."""
        prediction = self._denoiser.predict(x_t, t, conditioning, guidance_scale)
        return self._denoiser.x_0(prediction, x_t, t)

    def step(
        self,
        x_t: Tensor,
        step_index: Tensor,
        conditioning: Conditioning,
        guidance_scale: Tensor,
        *,
        next_index: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x_s at a later grid point. x_t: [B, C, H, W]; step_index, scale: [B].

        next_index: [B] int64, where to; the number of grid points means no noise left; None: the next grid point.
        noise: [B, C, H, W] standard normal, of policies that use it.
        """
        t = self._points[step_index]
        s = self._points[step_index + 1 if next_index is None else next_index]
        x_0 = self.predict_x_0(x_t, t, conditioning, guidance_scale)
        return self._go_on(x_t, x_0, t, s, noise)

    def _go_on(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor, noise: Tensor | None) -> Tensor:
        return ddim_step(x_t, x_0, t, s, schedule=self._denoiser.schedule)


class RenoisingStudentPolicy(StudentPolicy):
    """Estimates x_0 and diffuses it forward again with fresh noise: DMD2's generator (Yin et al. 2024, section 4.4).

    projection: holds its estimates in the support that thresholding assumes; None: they are taken as they are.
    """

    uses_noise = True

    def __init__(
        self, denoiser: Denoiser, grid: TrajectoryGrid, device: torch.device, projection: Threshold | None = None
    ) -> None:
        super().__init__(denoiser, grid, device)
        self._projection = projection

    def predict_x_0(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """x_0 [B, C, H, W], projected."""
        x_0 = self.estimate_x_0(x_t, t, conditioning, guidance_scale)
        return x_0 if self._projection is None else self._projection(x_0)

    def _go_on(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None, "this policy's transition needs noise"
        return self._denoiser.schedule.add_noise(x_0, noise, s)


class ConsistencyStudentPolicy(RenoisingStudentPolicy):
    """Re-noises too, from the consistency function's x_0, and may jump: it stops at a few of the solver's points."""

    def path(self, num_steps: int | None = None) -> tuple[int, ...]:
        assert num_steps is not None, "a consistency student's number of steps is free"
        return multistep_indices(num_steps, self.grid.num_steps)

    def predict_x_0(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """f(x_t, t) [B, C, H, W]: x_0 under the boundary condition."""
        return LCM_BOUNDARY.consistent(x_t, super().predict_x_0(x_t, t, conditioning, guidance_scale), t)


class TrajectoryStudentPolicy(StudentPolicy):
    """Strategic stochastic sampling of a trajectory consistency student (Zheng et al. 2024, Algorithm 4).

    A DDIM step on its own x_0 leads from t beyond the next stop s, to (1 - gamma) s; fresh noise leads back to s. It
    may jump as a consistency student does. It ends at timestep 0, with the little noise that is left there, as
    diffusers' `TCDScheduler` does.
    """

    def __init__(self, denoiser: Denoiser, grid: TrajectoryGrid, device: torch.device, *, gamma: float) -> None:
        super().__init__(denoiser, grid, device)
        self._points = self._points.clamp(min=0)
        self._gamma = gamma
        self.uses_noise = gamma > 0

    def path(self, num_steps: int | None = None) -> tuple[int, ...]:
        assert num_steps is not None, "a trajectory consistency student's number of steps is free"
        return multistep_indices(num_steps, self.grid.num_steps)

    def _go_on(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor, noise: Tensor | None) -> Tensor:
        schedule = self._denoiser.schedule
        beyond = ((1 - self._gamma) * s).floor().long()
        x = ddim_step(x_t, x_0, t, beyond, schedule=schedule)
        if not self.uses_noise:
            return x
        assert noise is not None, "this policy's transition needs noise"
        ratio = schedule.alpha(s) / schedule.alpha(beyond)
        return ratio * x + (1 - ratio.square()).sqrt() * noise
