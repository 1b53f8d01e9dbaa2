"""A randomly initialised Stable Diffusion pipeline of the real classes, small enough for unit tests, and its data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddil_dist.builtin import PIPELINE_DIR

CAPTIONS = ("a red square", "a blue circle", "ein grünes Dreieck", "a photo of <b>nothing</b>")


def save_tiny_pipeline(directory: Path, *, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Write a pipeline with latents of 4x4x4 and images of 16x16 to `directory`."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE_DIR / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return directory


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
