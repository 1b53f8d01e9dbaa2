"""Loading a text-to-image pipeline: the built-in one, a directory, or a hub id; safetensors only, no remote code."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ddil_dist.config import TeacherConfig
from ddil_dist.diffusion.parameterization import PredictionType
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.errors import ConfigError
from ddil_dist.models.conditioning import PromptEncoder
from ddil_dist.models.denoiser import Denoiser, torch_dtype
from ddil_dist.models.log_filters import quiet_bars
from ddil_dist.sources import check_pipeline_class, resolve_pipeline


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
        dtype = next(self.unet.parameters()).dtype
        return PromptEncoder(self.pipeline, self.device, dtype, image_size=self.image_size)

    @property
    def image_size(self) -> int:
        """Side of the decoded images, in pixels."""
        return self.latent_shape[1] * int(self.pipeline.vae_scale_factor)

    @property
    def keeps_clipping(self) -> bool:
        """Whether stock pipelines of this kind let their scheduler clip x_0: Stable Diffusion's switch it off as they
        are made, Stable Diffusion XL's do not."""
        return type(self.pipeline).__name__ == "StableDiffusionXLPipeline"

    def encoders_digest(self) -> str:
        """Of the weights that make latents of images and embeddings of captions, in the precision that they run in.

        A pipeline exported from this one, loaded in this one's precision, has the same. Takes seconds of a large one.
        """
        digest = hashlib.blake2b(digest_size=16)
        for module in (self.pipeline.vae, *text_encoders_of(self.pipeline)):
            for name, weights in sorted(module.named_parameters()):
                digest.update(f"{type(module).__name__}.{name} {weights.dtype} {tuple(weights.shape)}\0".encode())
                digest.update(weights.detach().flatten().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    def encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to VAE-scaled latents [B, C, h, w] float32, drawn from the posterior."""
        return self.draw_latents(*self.image_posterior(images), generator)

    @torch.no_grad()
    def image_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the VAE's latents of images in [-1, 1], both [B, C, h, w] float32, not scaled yet."""
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def draw_latents(self, mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from such a posterior, VAE-scaled, [B, C, h, w]."""
        noise = torch.randn(mean.shape, generator=generator).to(self.device)
        centre, scale = self._scaling
        latents: Tensor = (mean + std * noise - centre) * scale
        return latents

    @cached_property
    def _scaling(self) -> tuple[Tensor, Tensor]:
        """Centre and scale that the autoencoder's latents are brought to size by, for any [B, C, h, w]."""
        told = self.pipeline.vae.config
        mean, std = told.get("latents_mean"), told.get("latents_std")

        def column(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)

        if mean is None or std is None:
            return column(0.0), column(told.scaling_factor)
        return column(mean), told.scaling_factor / column(std)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """VAE-scaled latents [B, C, h, w] to images [B, 3, H, W] in [0, 1], float32."""
        vae = self.pipeline.vae
        centre, scale = self._scaling
        images: Tensor = vae.decode((latents / scale + centre).to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)


def load_teacher(config: TeacherConfig, device: torch.device) -> TeacherPipeline:
    """Load and freeze the teacher on a device. Raises ConfigError where it cannot serve as a teacher."""
    pipeline = _load_pipeline(config)
    name = config.pipeline
    if type(pipeline.scheduler).__name__ == "LCMScheduler":
        raise ConfigError(
            f"teacher.pipeline: {name!r} is sampled by an LCMScheduler, so it is itself distilled, and makes no DDIM "
            "steps; give the pipeline it was distilled from"
        )
    prediction_type = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in get_args(PredictionType):
        raise ConfigError(
            f"teacher.pipeline: {name!r} predicts {prediction_type!r}; supported: {', '.join(get_args(PredictionType))}"
        )
    schedule = NoiseSchedule.from_scheduler_config(pipeline.scheduler.config)
    if schedule.zero_terminal_snr and prediction_type == "epsilon":
        raise ConfigError(
            f"teacher.pipeline: {name!r} predicts epsilon, and its scheduler rescales to zero terminal SNR, where "
            "epsilon says nothing about x_0; set rescale_betas_zero_snr to false in its scheduler_config.json, or "
            "correct its prediction_type"
        )
    _freeze(pipeline, torch_dtype(config.precision))
    size = _latent_side(pipeline, name)
    _check_autoencoder(pipeline, name)
    return TeacherPipeline(
        pipeline=pipeline.to(device),
        schedule=schedule,
        prediction_type=prediction_type,
        latent_shape=(pipeline.unet.config.in_channels, size, size),
        device=device,
    )


def _latent_side(pipeline: Any, name: str) -> int:
    """Side of the latents that the network was made for, told as one number, as two, or by the autoencoder.

    Raises ConfigError where it is not told, or is no square.
    """
    size = pipeline.unet.config.sample_size
    if size is None:
        pixels = pipeline.vae.config.get("sample_size")
        size = None if pixels is None else pixels // int(pipeline.vae_scale_factor)
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise ConfigError(
            f"teacher.pipeline: the network of {name!r} has the sample_size {size!r}; it must be that of square "
            "latents: set it to one number in unet/config.json"
        )
    return int(sides.pop())


def _check_autoencoder(pipeline: Any, name: str) -> None:
    """Raises ConfigError for an autoencoder whose latents the stock pipelines of this kind would not bring to size."""
    vae = pipeline.vae
    if type(vae).__name__ != "AutoencoderKL":
        raise ConfigError(
            f"teacher.pipeline: the autoencoder of {name!r} is an {type(vae).__name__}; supported: AutoencoderKL, "
            "whose posterior training draws from; give the pipeline that one came with"
        )
    centred = vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None
    unread = [key for key in ("shift_factor",) if vae.config.get(key)]
    if centred and type(pipeline).__name__ != "StableDiffusionXLPipeline":
        unread.append("latents_mean")
    if unread:
        raise ConfigError(
            f"teacher.pipeline: the autoencoder of {name!r} has a {unread[0]}, which a {type(pipeline).__name__} does "
            "not read, so that its images would be off; give the autoencoder that belongs to it"
        )


def _load_pipeline(config: TeacherConfig) -> Any:
    """The stock pipeline as it is, of the class that its index names."""
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    source = resolve_pipeline(config.pipeline)
    options: dict[str, Any] = {
        "revision": config.revision,
        "variant": config.variant,
        "dtype": torch_dtype(config.precision),
    }
    try:
        index = DiffusionPipeline.load_config(source, revision=config.revision)
        kind = check_pipeline_class(config.pipeline, index)
        with quiet_bars():
            if kind == StableDiffusionXLPipeline.__name__:
                return StableDiffusionXLPipeline.from_pretrained(source, use_safetensors=True, **options)
            return StableDiffusionPipeline.from_pretrained(
                source, use_safetensors=True, safety_checker=None, requires_safety_checker=False, **options
            )
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"teacher.pipeline: {config.pipeline!r} does not load: {error}") from error


def _freeze(pipeline: Any, dtype: torch.dtype) -> None:
    """No module learns or drops out; each in the precision that it can run in."""
    pipeline.set_progress_bar_config(disable=True)
    for module in networks_of(pipeline).values():
        module.requires_grad_(False).eval()
    for encoder in text_encoders_of(pipeline):
        encoder.to(dtype)
    if dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
        pipeline.vae.to(torch.float32)  # Stable Diffusion XL's overflows in half precision


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's components that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def text_encoders_of(pipeline: Any) -> list[nn.Module]:
    """One text encoder, or two."""
    networks = networks_of(pipeline)
    return [networks[name] for name in ("text_encoder", "text_encoder_2") if name in networks]
