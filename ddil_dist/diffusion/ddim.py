"""DDIM: the deterministic transition, and its inverse question, which x_0 a given transition implies.

Stateless, so two models may take turns on one trajectory.
"""

from __future__ import annotations

from torch import Tensor

from ddil_dist.diffusion.parameterization import eps_from_x_0
from ddil_dist.diffusion.schedule import NoiseSchedule


def ddim_step(x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor, *, schedule: NoiseSchedule) -> Tensor:
    """x_s = alpha_s x_0 + sigma_s eps, with eps recomputed from x_0 (Song et al. 2021, Eq. 12, sigma = 0).

    x_t, x_0: [B, C, H, W]; x_0 is the prediction, thresholded or not. t, s: [B] int64 with s < t;
    s = FINAL_TIMESTEP gives x_0 itself.
    """
    eps = eps_from_x_0(x_0, x_t, schedule.alpha(t), schedule.sigma(t))
    return schedule.alpha(s) * x_0 + schedule.sigma(s) * eps


def x_0_of_transition(x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, *, schedule: NoiseSchedule) -> Tensor:
    """The x_0 for which one DDIM step from x_t at t lands on x_s at s (Salimans & Ho 2022, Eq. 43).

    x~ = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t); at sigma_s = 0 it is x_s.
    """
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return (x_s - ratio * x_t) / (schedule.alpha(s) - ratio * schedule.alpha(t))
