"""Assembles the teacher into a directory that stock `StableDiffusionPipeline.from_pretrained` loads."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from ddil_dist.builtin.training.unet import Teacher, new_scheduler


def save_pipeline(teacher: Teacher, *, vae: AutoencoderKL, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write the pipeline's folders and `model_index.json` to `out`.

    U-Net and VAE are stored in half precision, which diffusers widens to float32 on loading; the text encoder is stored
    in float32, because transformers keeps the stored precision.
    """
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=teacher.text_encoder.float(),
        tokenizer=tokenizer,
        unet=teacher.unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    _restore_text_prefix(out / "text_encoder" / "model.safetensors")
    _forget_origin(out / "vae" / "config.json")


def _forget_origin(path: Path) -> None:
    """Remove from a component's config the directory that it was once loaded from."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _restore_text_prefix(path: Path) -> None:
    """Name the text encoder's weights `text_model.*`, as Stable Diffusion's are.

    transformers 5 saves them without the prefix and reads both; transformers 4 would find none and start from noise.
    """
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
