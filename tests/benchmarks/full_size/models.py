"""Stable Diffusion 1.5 and XL as their published configurations describe them, with random weights: no hub, no disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ddil_dist.builtin import PIPELINE_DIR
from ddil_dist.config import RunConfig
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.models.denoiser import torch_dtype
from ddil_dist.models.pipeline import TeacherPipeline
from ddil_dist.models.student import GUIDANCE_EMBEDDING_DIM
from ddil_dist.problem import ImitationProblem

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TOKENS = 77


@dataclass(frozen=True)
class Model:
    """A pipeline's configurations; two text encoders make it one of Stable Diffusion XL. rows: of a batch."""

    title: str
    unet: Mapping[str, Any]
    text: tuple[Mapping[str, Any], ...]
    vae: Mapping[str, Any]
    rows: int


SD15 = Model(
    title="Stable Diffusion 1.5",
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    text=(CLIP_L,),
    vae=VAE,
    rows=16,
)
SDXL = Model(
    title="Stable Diffusion XL",
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    text=(CLIP_L, CLIP_G),
    vae={**VAE, "scaling_factor": 0.13025},
    rows=4,
)
SIZES = {"sd15": SD15, "sdxl": SDXL}

_NARROW = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
TINY = {
    "sd15": Model(
        title="tiny, in the layout of Stable Diffusion 1.5",
        unet={
            **SD15.unet,
            "sample_size": 8,
            "block_out_channels": (8, 16, 32, 32),
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
        },
        text=({**_NARROW, "hidden_size": 16},),
        vae={**SD15.vae, **_TINY_VAE},
        rows=2,
    ),
    "sdxl": Model(
        title="tiny, in the layout of Stable Diffusion XL",
        unet={
            **SDXL.unet,
            "sample_size": 8,
            "block_out_channels": (10, 20, 40),
            "norm_num_groups": 5,
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": 16 + 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        },
        text=({**_NARROW, "hidden_size": 16}, {**_NARROW, "hidden_size": 32, "projection_dim": 32}),
        vae={**SDXL.vae, **_TINY_VAE},
        rows=2,
    ),
}


def create_problem(model: Model, config: RunConfig, device: torch.device) -> ImitationProblem:
    """The problem of a configuration as if its pipeline had been loaded, in `teacher.precision`."""
    teacher = _teacher(model, config, device)
    grid = TrajectoryGrid.create(config.student.steps, config.teacher.steps, spacing="linspace")
    return ImitationProblem(config, device, teacher, grid, teacher.prompt_encoder())


def flops_per_image(model: Model) -> int:
    """Of one forward and backward pass of the student, counted on tensors without data; nothing is recomputed."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**model.unet, "time_cond_proj_dim": GUIDANCE_EMBEDDING_DIM})
        size, config = unet.config.sample_size, unet.config
        x, t = torch.randn(1, 4, size, size), torch.zeros(1, dtype=torch.int64)
        told = torch.randn(1, TOKENS, config.cross_attention_dim)
        added = None
        if config.addition_embed_type is not None:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.randn(1, 6)}
        scale = torch.randn(1, GUIDANCE_EMBEDDING_DIM)
    with FlopCounterMode(display=False) as counter:
        unet(x, t, told, timestep_cond=scale, added_cond_kwargs=added, return_dict=False)[0].sum().backward()
    return int(counter.get_total_flops())


def _teacher(model: Model, config: RunConfig, device: torch.device) -> TeacherPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE_DIR / "tokenizer", model_max_length=TOKENS)
    with device:
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(model.unet),
            "vae": AutoencoderKL(**model.vae),
            "text_encoder": CLIPTextModel(_text(model.text[0])),
        }
        if len(model.text) > 1:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(_text(model.text[1]))
    for part in parts.values():
        part.requires_grad_(False).eval().to(torch_dtype(config.teacher.precision))
    parts |= {"tokenizer": tokenizer, "scheduler": DDIMScheduler(**NOISE)}
    if len(model.text) > 1:
        pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    size = pipeline.unet.config.sample_size
    return TeacherPipeline(
        pipeline=pipeline,
        schedule=NoiseSchedule.from_scheduler_config(pipeline.scheduler.config),
        prediction_type="epsilon",
        latent_shape=(4, size, size),
        device=device,
    )


def _text(settings: Mapping[str, Any]) -> CLIPTextConfig:
    return CLIPTextConfig(vocab_size=49408, max_position_embeddings=TOKENS, **settings)
