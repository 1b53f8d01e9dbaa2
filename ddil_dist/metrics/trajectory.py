"""Paired trajectory error: does the student do what the expert would have done?

Student and teacher start from the same noise under the same prompt and guidance; their final latents are compared
one by one. Unlike a distance of distributions it has no sampling bias, and pairing removes most of its noise.
"""

from __future__ import annotations

from torch import Tensor


def paired_trajectory_error(latents: Tensor, teacher_latents: Tensor) -> float:
    """Mean over pairs and elements of (x_0 of the policy - x_0 of the teacher)^2.

    latents, teacher_latents: [N, C, H, W], VAE-scaled, at the end of trajectories from the same noise and prompts.
    """
    assert latents.shape == teacher_latents.shape, f"{tuple(latents.shape)} against {tuple(teacher_latents.shape)}"
    return float(paired_errors(latents, teacher_latents).mean())


def paired_errors(latents: Tensor, teacher_latents: Tensor) -> Tensor:
    """[N] float64 mean squared distance of each pair, for intervals; arguments as `paired_trajectory_error`."""
    return (latents.double() - teacher_latents.double()).square().flatten(1).mean(dim=1).cpu()
