"""Guidance: its one convention, and the embedding that diffusers' pipelines feed."""

from __future__ import annotations

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

from ddil_dist.diffusion.guidance import guidance_embedding, guide


def test_scale_1_is_the_conditional_and_0_the_unconditional_output() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide(conditional, unconditional, torch.ones(3)), conditional)
    assert torch.equal(guide(conditional, unconditional, torch.zeros(3)), unconditional)


def test_guidance_is_linear_in_its_scale_row_by_row() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([1.0, 2.5, 14.0])
    guided = guide(conditional, unconditional, scales)
    for row, w in enumerate(scales.tolist()):
        # Imagen's and LCM's form of the same, with w' = w - 1.
        other = conditional[row] + (w - 1) * (conditional[row] - unconditional[row])
        torch.testing.assert_close(guided[row], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pipeline", [StableDiffusionPipeline, LatentConsistencyModelPipeline])
@pytest.mark.parametrize("dim", [256, 32])
def test_embedding_is_what_diffusers_feeds(pipeline: type, dim: int) -> None:
    scales = torch.tensor([1.0, 1.5, 2.0, 7.5, 14.0])
    theirs = pipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=dim)  # type: ignore[attr-defined]
    # Angles reach 13,000, where a float32 ulp is 1e-3.
    torch.testing.assert_close(guidance_embedding(scales, dim), theirs, rtol=0, atol=2e-3)


def test_embedding_of_no_guidance_is_sines_of_zero() -> None:
    assert guidance_embedding(torch.ones(1), 8).tolist() == [[0.0] * 4 + [1.0] * 4]
