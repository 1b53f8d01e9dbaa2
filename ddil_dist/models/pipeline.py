"""Loading a text-to-image pipeline: the built-in one, a directory, or a hub id; safetensors only, no remote code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ddil_dist.config import TeacherConfig
from ddil_dist.diffusion.parameterization import PredictionType
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.errors import ConfigError
from ddil_dist.models.conditioning import PromptEncoder
from ddil_dist.models.denoiser import Denoiser, torch_dtype
from ddil_dist.models.quiet import quiet_bars
from ddil_dist.sources import resolve_pipeline


@dataclass(frozen=True)
class TeacherPipeline:
    """A loaded pipeline, frozen, with what the mathematics needs of it.

    latent_shape: (C, H, W) of x_t.
    """

    pipeline: Any
    schedule: NoiseSchedule
    prediction_type: PredictionType
    latent_shape: tuple[int, int, int]
    device: torch.device

    @property
    def unet(self) -> nn.Module:
        unet: nn.Module = self.pipeline.unet
        return unet

    def denoiser(self) -> Denoiser:
        return Denoiser(self.unet, self.schedule, self.prediction_type)

    def prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(self.pipeline, self.device, self.unet.dtype)  # type: ignore[arg-type]

    @property
    def image_size(self) -> int:
        """Side of the decoded images, in pixels."""
        return self.latent_shape[1] * int(self.pipeline.vae_scale_factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to VAE-scaled latents [B, C, h, w] float32, drawn from the posterior."""
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        latents = (posterior.mean.float() + posterior.std.float() * noise) * vae.config.scaling_factor
        assert isinstance(latents, Tensor)
        return latents

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """VAE-scaled latents [B, C, h, w] to images [B, 3, H, W] in [0, 1], float32."""
        vae = self.pipeline.vae
        images: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)


def load_teacher(config: TeacherConfig, device: torch.device) -> TeacherPipeline:
    """Load and freeze the teacher on a device. Raises ConfigError where it cannot serve as a teacher."""
    from diffusers import StableDiffusionPipeline

    source = resolve_pipeline(config.pipeline)
    dtype = torch_dtype(config.precision)
    try:
        with quiet_bars():
            pipeline = StableDiffusionPipeline.from_pretrained(
                source,
                revision=config.revision,
                variant=config.variant,
                dtype=dtype,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"teacher.pipeline: {config.pipeline!r} does not load: {error}") from error
    if pipeline.unet.config.time_cond_proj_dim is not None:
        raise ConfigError(
            f"teacher.pipeline: {config.pipeline!r} has a guidance embedding, so it is itself distilled; give the "
            "pipeline it was distilled from"
        )
    prediction_type = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in get_args(PredictionType):
        raise ConfigError(
            f"teacher.pipeline: {config.pipeline!r} predicts {prediction_type!r}; supported: "
            f"{', '.join(get_args(PredictionType))}"
        )
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    pipeline.text_encoder.to(dtype)
    size = pipeline.unet.config.sample_size
    return TeacherPipeline(
        pipeline=pipeline.to(device),
        schedule=NoiseSchedule.from_scheduler_config(pipeline.scheduler.config),
        prediction_type=prediction_type,
        latent_shape=(pipeline.unet.config.in_channels, size, size),
        device=device,
    )
