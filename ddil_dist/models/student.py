"""The networks that are trained: the teacher's, whole or as a frozen base with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddil_dist.config import StudentConfig
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
    if teacher_unet.config["time_cond_proj_dim"] is not None and config.guidance_embedding is False:
        raise ConfigError(
            "student.guidance_embedding: false, but the teacher's network has the guidance scale embedded, and its "
            "student inherits that; leave it at null"
        )
    if config.lora is not None:
        return {role: LoraNetwork(teacher_unet, config.lora) for role in roles}
    return {role: copy_network(teacher_unet, guidance_embedding=config.embeds_guidance) for role in roles}


def copy_network(teacher_unet: Any, *, guidance_embedding: bool) -> nn.Module:
    """A trainable float32 copy of a diffusers U-Net, equal to it at every guidance scale.

    guidance_embedding: add `time_cond_proj_dim`, unless the U-Net has it. Its projection begins at zero, so the copy of
    an undistilled teacher is the unguided teacher.
    """
    config = {key: value for key, value in teacher_unet.config.items() if not key.startswith("_")}
    new = guidance_embedding and config["time_cond_proj_dim"] is None
    if new:
        config["time_cond_proj_dim"] = GUIDANCE_EMBEDDING_DIM
    copy = type(teacher_unet).from_config(config)
    weights = {name: tensor.float() for name, tensor in teacher_unet.state_dict().items()}
    missing, unexpected = copy.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([GUIDANCE_PROJECTION] if new else [], [])
    if new:
        with torch.no_grad():
            copy.get_parameter(GUIDANCE_PROJECTION).zero_()
    assert isinstance(copy, nn.Module)
    return copy.float().requires_grad_(True)
