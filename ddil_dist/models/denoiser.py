"""A diffusers U-Net as one callable: (x_t, t, conditioning, guidance scale) to its raw prediction, in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddil_dist.diffusion.guidance import guidance_embedding
from ddil_dist.diffusion.parameterization import PredictionType, x_0_from_prediction
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.models.conditioning import Conditioning


class Denoiser:
    """A U-Net with its noise schedule and what it predicts.

    The network runs in its own dtype; inputs and outputs are float32. A network with `time_cond_proj_dim` is fed the
    embedded guidance scale and needs a single call; one without must be guided with two (`TeacherPolicy`).
    """

    def __init__(self, unet: nn.Module, schedule: NoiseSchedule, prediction_type: PredictionType) -> None:
        self.unet = unet
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type
        self._guidance_dim: int | None = _config_of(unet).get("time_cond_proj_dim")

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told the guidance scale, so that one call of it is guided."""
        return self._guidance_dim is not None

    def predict(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """The network's output [B, C, H, W] float32. x_t: [B, C, H, W]; t: [B] int64; guidance_scale: [B] or None."""
        dtype = input_dtype(self.unet)
        told: dict[str, Any] = {}
        embedded = None
        if self._guidance_dim is not None:
            assert guidance_scale is not None, "a guidance-conditioned network needs the scale"
            embedded = guidance_embedding(guidance_scale, self._guidance_dim).to(dtype)
        if conditioning.pooled is not None and conditioning.size_ids is not None:
            told["added_cond_kwargs"] = {
                "text_embeds": conditioning.pooled.to(dtype),
                "time_ids": conditioning.size_ids.to(dtype),
            }
        output = self.unet(
            x_t.to(dtype), t, conditioning.embeddings.to(dtype), timestep_cond=embedded, return_dict=False, **told
        )[0]
        assert isinstance(output, Tensor)
        return output.float()

    def x_0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 that an output at x_t implies, [B, C, H, W] float32."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return x_0_from_prediction(prediction, x_t, alpha, sigma, prediction_type=self.prediction_type)


def embeds_guidance(unet: nn.Module) -> bool:
    """Whether the network is told the guidance scale, so that one call of it is guided."""
    return _config_of(unet).get("time_cond_proj_dim") is not None


def _config_of(unet: nn.Module) -> dict[str, Any]:
    return dict(unwrapped(unet).config)  # type: ignore[arg-type]


def input_dtype(unet: nn.Module) -> torch.dtype:
    """The precision that a network computes in: its parameters', or its frozen base's where it is an adapter."""
    dtype = getattr(unwrapped(unet), "base_dtype", None)
    if dtype is None:
        dtype = next(unet.parameters()).dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def unwrapped(network: nn.Module) -> nn.Module:
    """The network itself, out of any data-parallel wrapper."""
    while hasattr(network, "module") and isinstance(network.module, nn.Module):
        network = network.module
    return network


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a precision's name ("float32", "float16", "bfloat16")."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
