"""The networks that are trained: the teacher's, whole or as a frozen base with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddil_dist.config import StudentConfig
from ddil_dist.diffusion.guidance import guidance_embedding
from ddil_dist.errors import ConfigError
from ddil_dist.models.lora import LoraNetwork

GUIDANCE_EMBEDDING_DIM = 256
GUIDANCE_PROJECTION = "time_embedding.cond_proj.weight"

STUDENT = "student"


def create_networks(teacher_unet: Any, config: StudentConfig, roles: Sequence[str]) -> dict[str, nn.Module]:
    """A trainable network for every role, the student's or a critic's, each equal to the teacher's at first.

    All are told the guidance scale, or none is. With `student.lora` every network is an adapter on the teacher's own
    frozen tensors; without, a full copy. Raises ConfigError where the teacher is told the scale and they must not be.
    """
    if _obeys_guidance(teacher_unet) and config.guidance_embedding is False:
        raise ConfigError(
            "student.guidance_embedding: false, but the teacher's network has the guidance scale embedded, and its "
            "student inherits that; leave it at null"
        )
    if config.lora is not None:
        return {role: LoraNetwork(teacher_unet, config.lora) for role in roles}
    return {role: copy_network(teacher_unet, embeds_guidance=config.embeds_guidance) for role in roles}


def copy_network(teacher_unet: Any, *, embeds_guidance: bool) -> nn.Module:
    """A trainable float32 copy of a diffusers U-Net, equal to it at every guidance scale.

    embeds_guidance: add `time_cond_proj_dim`, unless the U-Net has it. Its projection begins at zero, so the copy of
    an undistilled teacher is the unguided teacher.
    """
    config = {key: value for key, value in teacher_unet.config.items() if not key.startswith("_")}
    new = embeds_guidance and config["time_cond_proj_dim"] is None
    if new:
        config["time_cond_proj_dim"] = GUIDANCE_EMBEDDING_DIM
    if not embeds_guidance and not _obeys_guidance(teacher_unet):
        config["time_cond_proj_dim"] = None
    copy = type(teacher_unet).from_config(config)
    weights = {name: tensor.float() for name, tensor in teacher_unet.state_dict().items()}
    if config["time_cond_proj_dim"] is None:
        weights.pop(GUIDANCE_PROJECTION, None)
    missing, unexpected = copy.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([GUIDANCE_PROJECTION] if new else [], [])
    if new:
        with torch.no_grad():
            copy.get_parameter(GUIDANCE_PROJECTION).zero_()
    assert isinstance(copy, nn.Module)
    return copy.float().requires_grad_(True)


def _obeys_guidance(unet: Any) -> bool:
    """Whether the U-Net is told the guidance scale, and not in vain."""
    return unet.config["time_cond_proj_dim"] is not None and bool(unet.get_parameter(GUIDANCE_PROJECTION).any())


@torch.no_grad()
def fix_guidance(unet: Any, scale: float) -> None:
    """Have a U-Net that is told the guidance scale answer for `scale` at any, in place; its projection stays zero.

    What the projection adds to the time embedding's input at that scale becomes a part of the next layer's bias. A
    stock pipeline then neither doubles the batch for guidance, as it sees that the network is told, nor changes
    anything by the scale that it is called with.
    """
    projection, first = unet.get_parameter(GUIDANCE_PROJECTION), unet.time_embedding.linear_1
    told = guidance_embedding(torch.tensor([scale], device=projection.device), projection.shape[1]).to(projection)
    first.bias += first.weight @ (projection @ told[0])
    projection.zero_().requires_grad_(False)


def tell_in_vain(unet: Any) -> None:
    """Add to a U-Net that is not told the guidance scale a projection of zero, in place: see `fix_guidance`."""
    if unet.config["time_cond_proj_dim"] is not None:
        return
    first = unet.time_embedding.linear_1
    projection = nn.Linear(GUIDANCE_EMBEDDING_DIM, first.in_features, bias=False).to(first.weight)
    unet.time_embedding.cond_proj = projection.requires_grad_(False)
    nn.init.zeros_(projection.weight)
    unet.register_to_config(time_cond_proj_dim=GUIDANCE_EMBEDDING_DIM)
