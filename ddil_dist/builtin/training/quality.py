"""Measures the teacher: do samples show what their prompts name, and how far are they from the test set?

The sampler is deterministic DDIM (Song et al. 2021) over the grid that students use: linspace(0, 999, N + 1) rounded,
descending, its last point dropped; the last step ends at the predicted x_0. Written out here, so that the card's
numbers depend on no other part of the project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from ddil_dist.builtin.classifier import Classifier, batched_features


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the card's table."""

    steps: int
    guidance_scale: float
    agreement: float
    """Share of samples that the classifier gives their prompt's class, 0 to 1."""
    fid: float
    """Frechet distance of classifier features against the whole test set."""


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Wasserstein-2 distance of two Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64.

    The trace of the root is the sum of the roots of the product's eigenvalues, which are real and not negative.
    """
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots)


def frechet_to_reference(features: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Frechet distance of features [N, D] to a reference mean [D] and covariance [D, D]."""
    features = features.double().cpu()
    return frechet_distance(features.mean(dim=0), torch.cov(features.T), mean, covariance)


def grid_timesteps(num_steps: int) -> list[int]:
    """The N timesteps of the student grid, descending: 4 gives 999, 749, 500, 250."""
    points = torch.linspace(0, 999, num_steps + 1, dtype=torch.float64).round().long().tolist()
    return list(reversed(points))[:-1]


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    num_steps: int,
    guidance_scale: float,
    seed: int = 0,
    batch_size: int = 100,
) -> Tensor:
    """Images [N, 3, 32, 32] in [0, 1] of the prompts, on the CPU; the same seed gives the same starting noise."""
    device = pipeline.unet.device
    alpha_bar = pipeline.scheduler.alphas_cumprod.double()
    grid = grid_timesteps(num_steps)
    noise = torch.randn((len(prompts), 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=f"{num_steps} steps, w {guidance_scale}", mininterval=5):
        texts = list(prompts[start : start + batch_size])
        cond, uncond = pipeline.encode_prompt(texts, device, 1, guidance_scale > 1, negative_prompt=[""] * len(texts))
        embeddings = torch.cat([uncond, cond]) if guidance_scale > 1 else cond
        x = noise[start : start + batch_size].to(device)
        for t, t_next in zip(grid, [*grid[1:], None], strict=True):
            alpha, sigma = alpha_bar[t].sqrt().item(), (1 - alpha_bar[t]).sqrt().item()
            eps = pipeline.unet(x.repeat(len(embeddings) // len(x), 1, 1, 1), t, embeddings).sample
            if guidance_scale > 1:
                eps_uncond, eps_cond = eps.chunk(2)
                eps = eps_uncond + guidance_scale * (eps_cond - eps_uncond)
            x_0 = (x - sigma * eps) / alpha
            if t_next is None:
                x = x_0
            else:
                x = alpha_bar[t_next].sqrt().item() * x_0 + (1 - alpha_bar[t_next]).sqrt().item() * eps
        decoded = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
        images.append((decoded / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(images)


@torch.no_grad()
def score(
    images: Tensor, classes: Sequence[int], classifier: Classifier, reference: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Agreement with the classes, and Frechet distance to the reference's mean and covariance."""
    features = batched_features(classifier, images)
    predicted = classifier.head(features).argmax(dim=1)
    agreement = float((predicted == torch.tensor(classes)).double().mean())
    return agreement, frechet_to_reference(features, *reference)


def image_grid(images: Tensor, *, columns: int) -> Tensor:
    """[N, 3, H, W] to one [H rows, W columns] grey image in [0, 1]; N a multiple of `columns`."""
    num, _, height, width = images.shape
    rows = images.mean(dim=1).reshape(num // columns, columns, height, width)
    return rows.permute(0, 2, 1, 3).reshape(num // columns * height, columns * width)
