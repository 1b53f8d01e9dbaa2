"""The autoencoder: 32x32 RGB to 4x8x8 latents, a small `AutoencoderKL`.

Loss: mean absolute plus mean squared error of the image in [-1, 1], plus `KL_WEIGHT` times the mean divergence of a
latent dimension. No loss uses the classifier, whose features measure quality later. Then the encoder is frozen, and
with it the latents, and the decoder alone is refined. `scaling_factor` is set so that scaled latents of the
training images have unit standard deviation.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from ddil_dist.builtin.training.dataset import Split, to_rgb
from ddil_dist.builtin.training.loop import Plan, fit

KL_WEIGHT = 1e-3
PLAN = Plan(updates=2400, batch_size=64, lr=2e-3, warmup=100, fall=0.5, ema_decay=0.995, seed=1)
DECODER_PLAN = Plan(updates=2000, batch_size=64, lr=1e-3, warmup=50, fall=1.0, ema_decay=0.995, seed=6)


def new_vae() -> AutoencoderKL:
    """A fresh autoencoder with the shipped shape."""
    torch.manual_seed(PLAN.seed)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def train_vae(split: Split, *, checkpoint: Path, device: torch.device) -> AutoencoderKL:
    """Train the autoencoder on the images, refine its decoder, and set its scaling factor.

    The second part keeps its own checkpoint, beside `checkpoint`.
    """
    vae = new_vae()
    images = split.images.to(device)

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        x = to_rgb(images[indices]) * 2 - 1
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        total: Tensor = F.l1_loss(decoded, x) + F.mse_loss(decoded, x) + KL_WEIGHT * divergence
        return total

    def decoder_loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        x = to_rgb(images[indices]) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.sample(generator)
        decoded = vae.decode(latents).sample
        return F.l1_loss(decoded, x) + F.mse_loss(decoded, x)

    fit(vae, loss, plan=PLAN, num_samples=len(images), checkpoint=checkpoint, device=device)
    for encoder in (vae.encoder, vae.quant_conv):
        encoder.requires_grad_(False)
    decoder_checkpoint = checkpoint.with_name("decoder.pt")
    fit(vae, decoder_loss, plan=DECODER_PLAN, num_samples=len(images), checkpoint=decoder_checkpoint, device=device)
    moments = encode_all(vae, split, device=device)
    mean, std = moments.chunk(2, dim=1)
    total_std = (mean.var() + std.square().mean()).sqrt().item()
    vae.register_to_config(scaling_factor=round(1 / total_std, 5))
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderKL, split: Split, *, device: torch.device, batch_size: int = 250) -> Tensor:
    """Posterior mean and standard deviation of every image: [N, 8, 8, 8] float32 (4 + 4 channels), not scaled."""
    vae.to(device).eval()
    rows: list[Tensor] = []
    for images in tqdm(split.images.split(batch_size), desc="latents", mininterval=5):
        posterior = vae.encode(to_rgb(images.to(device)) * 2 - 1).latent_dist
        rows.append(torch.cat([posterior.mean, posterior.std], dim=1).cpu())
    return torch.cat(rows)
