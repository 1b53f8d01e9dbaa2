"""Writing a stock diffusers pipeline: it loads with `from_pretrained` and needs no code of ours."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ddil_dist.models.log_filters import quiet_bars
from ddil_dist.models.pipeline import TeacherPipeline


def export_pipeline(teacher: TeacherPipeline, unet: nn.Module, scheduler: Any, path: Path) -> None:
    """Write the teacher's pipeline with another U-Net and scheduler to `path`, replacing what is there once whole.

    unet: a stock `UNet2DConditionModel`, float32. So is all that is written, whatever precision the teacher runs in:
    text encoders load in the precision that they were saved in, U-Nets in float32, and stock pipelines cannot mix them.
    """
    own = teacher.pipeline
    options = {key: value for key, value in own.config.items() if key not in own.components and key[0] != "_"}
    components = {name: _in_float32(part) for name, part in own.components.items() if name != "unet"}
    pipeline = type(own)(**{**components, "unet": unet.eval(), "scheduler": scheduler}, **options)
    with staged(path) as staging, quiet_bars():
        pipeline.save_pretrained(staging, safe_serialization=True)
        _forget_origins(staging)
        _restore_text_prefix(staging / "text_encoder" / "model.safetensors")
        for tokenizer in staging.glob("tokenizer*/tokenizer.json"):
            _write_vocabulary(tokenizer)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A directory beside `path` that takes its place when the block ends well, and is gone when it does not."""
    staging = path.with_name(path.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    replace_directory(path, staging)


def replace_directory(path: Path, by: Path) -> None:
    """Move the directory `by` to `path`; what was there is gone."""
    if path.exists():
        shutil.rmtree(path)
    by.replace(path)


def _in_float32(part: Any) -> Any:
    """The component, or a copy of it where its weights are of another precision."""
    if not isinstance(part, nn.Module) or next(part.parameters()).dtype == torch.float32:
        return part
    return copy.deepcopy(part).float()


def _forget_origins(directory: Path) -> None:
    """Remove from every configuration the place that its component was once loaded from."""
    for path in directory.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        if '"_name_or_path"' in text:
            config = json.loads(text)
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _restore_text_prefix(path: Path) -> None:
    """Name a CLIP text encoder's weights `text_model.*`, as Stable Diffusion's are.

    transformers 5 saves them without the prefix and reads both; transformers 4 would find none and start from noise.
    """
    if path.is_file():  # absent where the weights are in several files
        state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})


def _write_vocabulary(tokenizer: Path) -> None:
    """Write vocab.json and merges.txt beside a tokenizer.json, where it is a byte-pair encoding, as CLIP's is.

    transformers 5 reads and writes tokenizer.json alone; transformers 4 and other programs want the two.
    """
    told = json.loads(tokenizer.read_text(encoding="utf-8"))
    model = told["model"]
    if model["type"] != "BPE":
        return
    vocabulary = {**model["vocab"], **{token["content"]: token["id"] for token in told["added_tokens"]}}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tokenizer.parent / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (tokenizer.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
