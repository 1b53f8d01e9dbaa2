"""A small OpenCLIP model of the captioned images: does a picture match its words?

A ViT with 4x4 patches on 32x32 pixels and a two-layer text tower, built and loaded by open_clip itself from a local
directory. Captions of one class are all true of each other's images, so every pair of the same class counts as
positive (UniCL; Yang et al. 2022) instead of the diagonal alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from ddil_dist.builtin.training.dataset import Split, to_rgb
from ddil_dist.builtin.training.loop import Plan, fit
from ddil_dist.builtin.training.tokenizer import MAX_TOKENS, encode

PLAN = Plan(updates=1600, batch_size=128, lr=1e-3, warmup=200, fall=0.7, weight_decay=0.05, ema_decay=0.99, seed=4)
MEAN, STD = (0.22, 0.22, 0.22), (0.33, 0.33, 0.33)
MAX_LOGIT_SCALE = 100.0


def write_config(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Write open_clip's config and the tokenizer's files to `folder`."""
    model = {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 4,
            "layers": 4,
            "width": 96,
            "head_width": 32,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "clip",  # open_clip reads the tokenizer of a local-dir model from that directory
            "width": 64,
            "heads": 2,
            "layers": 2,
            "mlp_ratio": 2.0,
        },
    }
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    tokenizer.save_pretrained(str(folder))
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift a batch by up to two pixels, and brighten or dim each image by up to a quarter. [B, 3, 32, 32]."""
    device = images.device
    dy, dx = torch.randint(-2, 3, (2,), generator=generator, device=device).tolist()
    gain = 0.75 + 0.5 * torch.rand((len(images), 1, 1, 1), generator=generator, device=device)
    return (images.roll((dy, dx), dims=(2, 3)) * gain).clamp(0, 1)


def train_clip(
    split: Split,
    captions: Sequence[str],
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    checkpoint: Path,
    device: torch.device,
) -> None:
    """Train on images and captions; `folder` gets config, tokenizer and half-precision weights."""
    write_config(folder, tokenizer)
    torch.manual_seed(PLAN.seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, output_dict=False)
    images, labels = split.images.to(device), split.labels.to(device)
    tokens = torch.tensor(encode(tokenizer, captions), device=device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        x = (_shift(to_rgb(images[indices]), generator) - mean) / std
        image = F.normalize(model.encode_image(x), dim=1)
        text = F.normalize(model.encode_text(tokens[indices]), dim=1)
        logits = model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * image @ text.T
        same = (labels[indices][:, None] == labels[indices]).float()
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit(model, loss, plan=PLAN, num_samples=len(images), checkpoint=checkpoint, device=device)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / "open_clip_model.safetensors")


@torch.no_grad()
def zero_shot_accuracy(folder: Path, split: Split, *, device: torch.device) -> float:
    """Share of images whose nearest of "a photo of ..." captions, one a class, is of their class."""
    from ddil_dist.builtin.captions import NOUNS

    name = f"local-dir:{folder}"
    model, _ = open_clip.create_model_from_pretrained(name, device=device)
    model.eval()
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    texts = open_clip.get_tokenizer(name)([f"a photo of {nouns[0]}" for nouns in NOUNS]).to(device)
    text = F.normalize(model.encode_text(texts), dim=1)
    right = 0
    for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True):
        image = model.encode_image((to_rgb(images.to(device)) - mean) / std)
        right += int(((image @ text.T).argmax(dim=1).cpu() == labels).sum())
    return right / len(split.labels)
