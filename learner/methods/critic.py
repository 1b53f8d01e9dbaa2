"""The critic of distribution matching: a U-Net that learns the score of the student's samples, and a head that tells
them from data by the U-Net's bottleneck (Yin et al. 2024, DMD2, section 4.3).

One module with one `forward`, so that data parallelism averages the gradients of both halves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddil_dist.models.denoiser import Denoiser
from ddil_dist.models.lora import inner_unet


class Critic(nn.Module):
    """Called as a diffusers U-Net, it predicts as one; called through `LogitsOf`, it gives the head's logits.

    unet     the fake score's network.
    frozen   a network whose bottleneck the head reads instead of the U-Net's own; it is no part of this module.
    head     is there if `discriminate`; for latents of `latent_side`, None: as the U-Net's configuration has it.
    """

    def __init__(
        self, unet: Any, *, discriminate: bool, frozen: Any | None = None, latent_side: int | None = None
    ) -> None:
        super().__init__()
        self.unet = unet
        self.config = unet.config
        self.base_dtype = getattr(unet, "base_dtype", None)  # of an adapter, which Denoiser asks for
        self._frozen = (frozen,)  # in a tuple, nn.Module does not register it
        self._no_split_modules = getattr(unet, "_no_split_modules", None)  # where workers share it block by block
        self.head = create_head(unet.config, latent_side or int(unet.config["sample_size"])) if discriminate else None

    def forward(self, *args: Any, logits: bool = False, **kwargs: Any) -> Any:
        """The U-Net's output; with `logits` the head's [B, 1] in a tuple."""
        if not logits:
            return self.unet(*args, **kwargs)
        assert self.head is not None, "this critic does not discriminate"
        if self._frozen[0] is None:
            features = bottleneck(inner_unet(self.unet), *args, **kwargs)
        else:  # which keeps its own precision, whatever this network is called in
            with torch.autocast(args[0].device.type, enabled=False):
                features = bottleneck(inner_unet(self._frozen[0]), *args, **kwargs)
        return (self.head(features.to(next(self.head.parameters()).dtype)).mean((2, 3)),)

    def enable_gradient_checkpointing(self) -> None:
        """As the U-Net's."""
        self.unet.enable_gradient_checkpointing()


class LogitsOf(nn.Module):
    """A critic, perhaps wrapped for data parallelism, as a network whose output is the head's logits."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.module = critic

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, logits=True, **kwargs)


def discriminator(critic: Denoiser) -> Denoiser:
    """A critic's denoiser as its discriminator: `predict` gives logits [B, 1] of noised latents."""
    return Denoiser(LogitsOf(critic.unet), critic.schedule, "sample")


def bottleneck(unet: Any, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **told: Any) -> Tensor:
    """A diffusers U-Net's hidden state [B, C, h, w] between its halves; the second half is never run."""
    hidden, _ = first_half(unet, sample, timestep, encoder_hidden_states, **told)
    return hidden[-1]


def first_half(
    unet: Any,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    *,
    timestep_cond: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    return_dict: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """A diffusers U-Net's hidden states [B, C, h, w] after each block down and the middle one, the last the bottleneck;
    and what it makes of time and sizes, [B, D]."""
    dtype = unet.dtype
    sample, states = sample.to(dtype), encoder_hidden_states.to(dtype)
    told_scale = None
    if timestep_cond is not None and unet.config.time_cond_proj_dim is not None:
        told_scale = timestep_cond.to(dtype)
    time = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), told_scale)
    added = unet.get_aug_embed(emb=time, encoder_hidden_states=states, added_cond_kwargs=added_cond_kwargs)
    time = time if added is None else time + added
    states = unet.process_encoder_hidden_states(encoder_hidden_states=states, added_cond_kwargs=added_cond_kwargs)
    hidden, found = unet.conv_in(sample), []
    for block in unet.down_blocks:
        attends = getattr(block, "has_cross_attention", False)
        told = {"encoder_hidden_states": states} if attends else {}
        hidden, _ = block(hidden_states=hidden, temb=time, **told)
        found.append(hidden)
    if unet.mid_block is not None:  # some distilled U-Nets have none
        told = {"encoder_hidden_states": states} if getattr(unet.mid_block, "has_cross_attention", False) else {}
        found.append(unet.mid_block(hidden, time, **told))
    return found, time


def create_head(config: Any, latent_side: int) -> nn.Sequential:
    """Strided 4x4 convolutions with GroupNorm and SiLU down to one position, then one logit (DMD2's head).

    A bottleneck of side 32 is halved three times, then a 4x4 convolution covers it whole; one under 4 at once.
    """
    channels = int(config["block_out_channels"][-1])
    side = latent_side >> (len(config["block_out_channels"]) - 1)
    layers: list[nn.Module] = []
    while side > 4:
        layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), *_normalised(channels)]
        side //= 2
    layers += [nn.Conv2d(channels, channels, max(1, side)), *_normalised(channels)]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def _normalised(channels: int) -> tuple[nn.Module, nn.Module]:
    """32 groups, or as many as leave each at least 8 channels: the last one has a single position to normalise over."""
    most = max(1, min(32, channels // 8))
    return nn.GroupNorm(next(num for num in range(most, 0, -1) if channels % num == 0), channels), nn.SiLU()


def noised(x_0: Tensor, t: Tensor, schedule: Any) -> tuple[Tensor, Tensor]:
    """x_t and its noise, both [B, C, H, W]; t: [B]. Drawn on the CPU, so that a seed means the same anywhere."""
    noise = torch.randn(x_0.shape).to(x_0.device)
    return schedule.add_noise(x_0, noise, t), noise
