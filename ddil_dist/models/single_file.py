"""A pipeline's weights in one file, under the names of the original Stable Diffusion code, which other programs read.

Only names and a few shapes differ; no number does. Stable Diffusion 1.x keeps one text encoder, XL two, of which the
second is laid out as OpenCLIP's. What the layout has no place for is refused: no reader would miss it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from ddil_dist.errors import ExportError
from ddil_dist.models.student import GUIDANCE_PROJECTION

UNET: Final = "model.diffusion_model."
VAE: Final = "first_stage_model."
TEXT: Final = "cond_stage_model.transformer."
TEXTS_XL: Final = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")

RESNET: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS: Final = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION: Final = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP: Final = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_single_file(pipeline: Any, path: Path) -> None:
    """Write the pipeline's weights to the file `path`.

    Raises ExportError for what would be read otherwise than it is: a U-Net that obeys an embedded guidance scale,
    Stable Diffusion 2.x, another prediction than eps, centred latents.
    """
    _check_readable(pipeline)
    unet = dict(pipeline.unet.state_dict())
    projection = unet.pop(GUIDANCE_PROJECTION, None)
    if projection is not None and bool(projection.any()):
        raise ExportError(
            "this student is told the guidance scale by its own projection, which single files have no place for: a "
            "program that reads one would run it unguided. Distil at one scale (teacher.guidance={min: 5, max: 5}), or "
            "use the pipeline's directory"
        )
    layers = int(pipeline.unet.config.layers_per_block)
    attends = [any(f"up_blocks.{block}.attentions" in name for name in unet) for block in range(8)]
    tensors = {UNET + unet_name(name, layers, attends): tensor for name, tensor in unet.items()}
    blocks = len(pipeline.vae.config.block_out_channels)
    for name, tensor in pipeline.vae.state_dict().items():
        other, is_attention = vae_name(name, blocks)
        matrix = is_attention and name.endswith("weight") and tensor.ndim == 2
        tensors[VAE + other] = tensor[:, :, None, None] if matrix else tensor
    tensors |= dict(_texts(pipeline))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(path)


def _check_readable(pipeline: Any) -> None:
    remedy = "use the pipeline's directory, which says all of it"
    if getattr(pipeline, "text_encoder_2", None) is None and pipeline.unet.config.use_linear_projection:
        raise ExportError(
            f"a Stable Diffusion 2.x pipeline: single files of that kind hold OpenCLIP's text encoder, and readers of "
            f"them would find none in ours; {remedy}"
        )
    kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise ExportError(
            f"this student predicts {kind!r}, which a single file does not say, and readers take for epsilon; {remedy}"
        )
    told = pipeline.vae.config
    if told.get("latents_mean") is not None or told.get("latents_std") is not None:
        raise ExportError(
            f"the autoencoder has latents_mean and latents_std, which a single file does not hold; {remedy}"
        )
    if not isinstance(pipeline.unet.config.layers_per_block, int):
        raise ExportError(f"the U-Net has blocks of different depths (layers_per_block); {remedy}")


def unet_name(name: str, layers: int, attends: list[bool]) -> str:
    """Of a diffusers U-Net's tensor, the original's; attends: whether an up block has attention, by its number."""
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    found = re.fullmatch(
        r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    )
    if found is not None:
        side, block, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if side == "down_blocks":
            place = (layers + 1) * block + index + 1
            if kind == "downsamplers":
                return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{place}.{_part(kind, rest)}"
        if kind == "upsamplers":
            last = 2 if attends[block] else 1
            return f"output_blocks.{(layers + 1) * block + layers}.{last}.{rest}"
        return f"output_blocks.{(layers + 1) * block + index}.{_part(kind, rest)}"
    found = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
    if found is None:
        raise ExportError(f"the U-Net has a tensor {name!r}, which the original layout has no name for")
    kind, index, rest = found[1], int(found[2]), found[3]
    inner = rest if kind == "attentions" else _renamed(rest, RESNET)
    return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{inner}"


def _part(kind: str, rest: str) -> str:
    return f"1.{rest}" if kind == "attentions" else f"0.{_renamed(rest, RESNET)}"


def vae_name(name: str, blocks: int) -> tuple[str, bool]:
    """Of a diffusers autoencoder's tensor, the original's, and whether it is an attention's."""
    found = re.fullmatch(r"(encoder|decoder)\.(.*)", name)
    if found is None:
        return name, False  # quant_conv and post_quant_conv
    half, rest = found[1], found[2]
    attention = re.fullmatch(r"mid_block\.attentions\.0\.(.*)", rest)
    if attention is not None:
        return f"{half}.mid.attn_1.{_renamed(attention[1], ATTENTION)}", True
    rest = re.sub(r"^mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", rest)
    rest = re.sub(r"^down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", rest)
    rest = re.sub(r"^down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", rest)
    rest = re.sub(r"^up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", rest)
    rest = re.sub(r"^up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.", rest)
    return f"{half}.{rest.replace('conv_norm_out', 'norm_out').replace('conv_shortcut', 'nin_shortcut')}", False


def _texts(pipeline: Any) -> Iterator[tuple[str, Tensor]]:
    second = getattr(pipeline, "text_encoder_2", None)
    first = TEXT if second is None else TEXTS_XL[0]
    for name, tensor in pipeline.text_encoder.state_dict().items():
        yield f"{first}text_model.{name.removeprefix('text_model.')}", tensor
    if second is not None:
        yield from ((TEXTS_XL[1] + name, tensor) for name, tensor in open_clip_text(second.state_dict()).items())


def open_clip_text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder with projection of transformers, in OpenCLIP's layout: queries, keys and values in one tensor."""
    converted: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for full, tensor in state.items():
        name = full.removeprefix("text_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
        if name == "text_projection.weight":
            converted["text_projection"] = tensor.T
        elif name == "embeddings.position_embedding.weight":
            converted["positional_embedding"] = tensor
        elif name == "embeddings.token_embedding.weight":
            converted["token_embedding.weight"] = tensor
        elif name.startswith("final_layer_norm."):
            converted[name.replace("final_layer_norm", "ln_final")] = tensor
        elif layer is not None:
            part = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", layer[2])
            if part is None:
                converted[f"transformer.resblocks.{layer[1]}.{_renamed(layer[2], OPEN_CLIP)}"] = tensor
            else:
                joined.setdefault(f"transformer.resblocks.{layer[1]}.attn.in_proj_{part[2]}", {})[part[1]] = tensor
    for name, parts in joined.items():
        converted[name] = torch.cat([parts[letter] for letter in "qkv"])
    return converted


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name
