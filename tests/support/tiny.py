"""Randomly initialised pipelines of the real classes, small enough for unit tests, and their data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ddil_dist.builtin import PIPELINE_DIR

CAPTIONS = ("a red square", "a blue circle", "ein grünes Dreieck", "a photo of <b>nothing</b>")


def save_tiny_pipeline(
    directory: Path,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    rescale_betas_zero_snr: bool = False,
    num_train_timesteps: int = 1000,
) -> Path:
    """Write a Stable Diffusion pipeline with latents of 4x4x4 and images of 16x16 to `directory`."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer, layers=1)),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=_scheduler(
            prediction_type=prediction_type,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
            num_train_timesteps=num_train_timesteps,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return directory


def save_tiny_sdxl_pipeline(
    directory: Path,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    force_zeros_for_empty_prompt: bool = True,
    pruned: bool = False,
) -> Path:
    """Write a Stable Diffusion XL pipeline, two text encoders and all, with latents of 4x4x4 to `directory`.

    pruned: with layers taken out of its U-Net, as SSD-1B's and Segmind-Vega's have.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    wide = _text_config(tokenizer, layers=2, width=24)
    unet = _unet(
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        **(
            {
                "mid_block_type": None,
                "transformer_layers_per_block": [[1], [1]],
                "reverse_transformer_layers_per_block": [[2, 1], [1, 1]],
            }
            if pruned
            else {"transformer_layers_per_block": (1, 2)}
        ),
    )
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(wide),
        tokenizer=tokenizer,
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=_scheduler(prediction_type=prediction_type),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    ).save_pretrained(directory)
    return directory


def _tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(PIPELINE_DIR / "tokenizer")


def _text_config(tokenizer: Any, *, layers: int, width: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {"cross_attention_dim": 16, **changes}
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        **settings,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def _scheduler(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **changes,
    )


def save_tiny_data(path: Path, *, num: int = 24, seed: int = 0) -> Path:
    """Write `num` captioned random images as Parquet to `path`."""
    generator = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for index in range(num):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, size=(20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{index}.png"}, "text": CAPTIONS[index % 4]})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
