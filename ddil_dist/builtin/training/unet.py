"""The teacher: a latent U-Net with cross-attention and its text encoder, trained together to predict the noise.

Stable Diffusion's own recipe at a thousandth of its size: the scaled-linear noise schedule over 1000 timesteps, epsilon
prediction, and one caption in ten replaced by the empty one, for classifier-free guidance (Ho & Salimans 2022).
Latents are cached as posterior mean and standard deviation and drawn afresh each time. No flips: shoes all point left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddil_dist.builtin.training.loop import Plan, fit
from ddil_dist.builtin.training.tokenizer import MAX_TOKENS, encode

TEXT_WIDTH = 64
DROP_CAPTION = 0.1
PLAN = Plan(updates=12_000, batch_size=64, lr=1e-3, warmup=400, fall=0.3, ema_decay=0.9995, seed=2)


class Teacher(nn.Module):
    """The two networks that train together; holds them for one optimizer and one checkpoint."""

    def __init__(self, *, vocab_size: int, bos_token_id: int, eos_token_id: int, pad_token_id: int) -> None:
        super().__init__()
        torch.manual_seed(PLAN.seed)
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(64, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=bos_token_id,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
            )
        )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def new_teacher(tokenizer: CLIPTokenizer) -> Teacher:
    """A fresh teacher with the shipped shape, for the tokenizer's vocabulary."""
    return Teacher(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_teacher(
    moments: Tensor,
    captions: Sequence[str],
    tokenizer: CLIPTokenizer,
    *,
    scaling_factor: float,
    plan: Plan,
    checkpoint: Path,
    device: torch.device,
) -> Teacher:
    """Train U-Net and text encoder on cached latents.

    moments: [N, 8, 8, 8] posterior mean and standard deviation (4 + 4 channels), not scaled. captions: N texts.
    """
    teacher = new_teacher(tokenizer)
    mean, std = (moments.to(device) * scaling_factor).chunk(2, dim=1)
    tokens = torch.tensor(encode(tokenizer, captions), device=device)
    empty = torch.tensor(encode(tokenizer, [""]), device=device)
    alphas_cumprod = new_scheduler().alphas_cumprod.to(device)

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        num = len(indices)
        shape = (num, *mean.shape[1:])
        x_0 = mean[indices] + std[indices] * torch.randn(shape, generator=generator, device=device)
        noise = torch.randn(shape, generator=generator, device=device)
        t = torch.randint(0, len(alphas_cumprod), (num,), generator=generator, device=device)
        alpha_bar = alphas_cumprod[t][:, None, None, None]
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        dropped = torch.rand(num, generator=generator, device=device) < DROP_CAPTION
        ids = torch.where(dropped[:, None], empty, tokens[indices])
        embeddings = teacher.text_encoder(ids).last_hidden_state
        return F.mse_loss(teacher.unet(x_t, t, embeddings).sample, noise)

    fit(teacher, loss, plan=plan, num_samples=len(moments), checkpoint=checkpoint, device=device)
    return teacher
