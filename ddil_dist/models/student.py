"""The student's network: the teacher's, with a guidance embedding that at first changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

GUIDANCE_EMBEDDING_DIM = 256


def create_student(teacher_unet: Any) -> nn.Module:
    """A trainable float32 copy of a diffusers U-Net with `time_cond_proj_dim`, equal to it at every guidance scale.

    The embedding's projection begins at zero, so the first student is the unguided teacher.
    """
    config = {key: value for key, value in teacher_unet.config.items() if not key.startswith("_")}
    config["time_cond_proj_dim"] = GUIDANCE_EMBEDDING_DIM
    student = type(teacher_unet).from_config(config)
    weights = {name: tensor.float() for name, tensor in teacher_unet.state_dict().items()}
    missing, unexpected = student.load_state_dict(weights, strict=False)
    projection = "time_embedding.cond_proj.weight"
    assert (missing, unexpected) == ([projection], [])
    with torch.no_grad():
        student.get_parameter(projection).zero_()
    assert isinstance(student, nn.Module)
    return student.float().requires_grad_(True)
