"""A stock pipeline as a function from prompts and seeds to images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddil_dist.errors import ConfigError
from ddil_dist.models.log_filters import quiet_bars
from ddil_dist.sampling import seeded

StockSampler = Literal["own", "ddim", "dpmsolver++", "lcm"]
"""own: the scheduler that the pipeline comes with; the others: diffusers' DDIM, DPM-Solver++ 2M and LCM, its settings
taken over."""


@dataclass(frozen=True)
class Sampling:
    """How images are sampled."""

    sampler: StockSampler
    steps: int
    guidance_scale: float
    """As the pipeline's call takes it."""


class StockPipeline:
    """A text-to-image pipeline of diffusers, of any class whose call takes prompts, steps, guidance and generators."""

    def __init__(self, name: str, sampling: Sampling, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load it: a directory or a hub id, safetensors only. Raises ConfigError where it cannot be sampled so."""
        from diffusers import DiffusionPipeline

        self.name = name
        self._sampling = sampling
        try:
            with quiet_bars():
                pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--pipeline: {name!r} does not load: {error}") from error
        pipeline.scheduler = _scheduler(pipeline, name, sampling.sampler)
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline: Any = pipeline.to(device)

    @property
    def sampler_name(self) -> str:
        """For the protocol."""
        return type(self._pipeline.scheduler).__name__.removesuffix("Scheduler")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, int]:
        """Images [B, 3, H, W] float32 on the CPU in [0, 1], and the rows that the denoiser was called with for them.

        A trajectory's noise follows from its own seed: the same in any batch, and for any pipeline of equal latents.
        """
        with _counted_rows(_denoiser(self._pipeline)) as rows:
            images: Tensor = self._pipeline(
                list(prompts),
                num_inference_steps=self._sampling.steps,
                guidance_scale=self._sampling.guidance_scale,
                generator=seeded(seeds),
                output_type="pt",
            ).images
        return images.float().cpu(), sum(rows)


def _scheduler(pipeline: Any, name: str, sampler: StockSampler) -> Any:
    import diffusers

    own = pipeline.scheduler
    if sampler == "own":
        return own
    if "num_train_timesteps" not in own.config or not hasattr(own, "alphas_cumprod"):
        raise ConfigError(
            f"--sampler: {sampler!r} is a sampler of diffusion, and {name!r} comes with {type(own).__name__}, which "
            "has no alphas_cumprod; use --sampler own"
        )
    kept = {key: value for key, value in own.config.items() if key not in ("solver_order", "algorithm_type")}
    if sampler == "ddim":
        return diffusers.DDIMScheduler.from_config(kept)
    if sampler == "lcm":
        return diffusers.LCMScheduler.from_config(kept)
    return diffusers.DPMSolverMultistepScheduler.from_config(kept, solver_order=2, algorithm_type="dpmsolver++")


def _denoiser(pipeline: Any) -> torch.nn.Module:
    for part in ("unet", "transformer"):
        network = getattr(pipeline, part, None)
        if isinstance(network, torch.nn.Module):
            return network
    raise ConfigError(f"--pipeline: a {type(pipeline).__name__} has neither a unet nor a transformer to be called")


@contextmanager
def _counted_rows(network: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of every call of `network` in the block."""
    rows: list[int] = []

    def count(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = (value for value in (*positional, *named.values()) if isinstance(value, Tensor) and value.dim() > 2)
        rows.append(len(next(tensors)))

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


SAMPLERS = get_args(StockSampler)
