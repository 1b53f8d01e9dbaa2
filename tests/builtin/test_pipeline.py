"""The teacher as a user meets it: stock diffusers loads it, and it draws what it is asked for."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ddil_dist.builtin import PIPELINE_DIR, evaluation_prompts, load_classifier
from ddil_dist.builtin.training.quality import sample


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE_DIR)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_network_loads_in_float32_with_stable_diffusions_schedule(pipeline: StableDiffusionPipeline) -> None:
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.scheduler.alphas_cumprod[[0, -1]].tolist() == pytest.approx([0.99915, 0.0046596], rel=1e-3)
    assert pipeline.safety_checker is None
    assert not pipeline.config.requires_safety_checker


def test_samples_show_what_their_prompts_name(pipeline: StableDiffusionPipeline) -> None:
    prompts, classes = zip(*evaluation_prompts(100), strict=True)
    images = sample(pipeline, prompts, num_steps=12, guidance_scale=3.0)
    with torch.no_grad():
        predicted = load_classifier()(images).argmax(dim=1)
    assert (predicted == torch.tensor(classes)).double().mean() > 0.8


def test_a_stock_call_with_default_guidance_draws_the_prompt(pipeline: StableDiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = ["a photo of an ankle boot", "a picture of a pair of trousers", "a black-and-white photo of a bag"]
    images = pipeline(prompts, num_inference_steps=20, generator=generator, output_type="pt").images
    assert images.shape == (3, 3, 32, 32)
    assert load_classifier()(images).argmax(dim=1).tolist() == [9, 1, 8]


def test_the_autoencoder_keeps_images_and_scales_latents_to_one(pipeline: StableDiffusionPipeline) -> None:
    images = sample(pipeline, [p for p, _ in evaluation_prompts(50)], num_steps=4, guidance_scale=1.0)
    with torch.no_grad():
        latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean
        decoded = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert (decoded - images).abs().mean() < 0.03
    assert 0.8 < (latents * pipeline.vae.config.scaling_factor).std() < 1.2
