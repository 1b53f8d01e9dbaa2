"""AdamW and its learning-rate schedule from the configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ddil_dist.config import OptimizerConfig


def create_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, updates: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """The optimizer and its schedule over `updates` updates."""
    optimizer = torch.optim.AdamW(
        list(parameters), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    return optimizer, LambdaLR(optimizer, lambda update: learning_rate_factor(config, update, updates=updates))


def learning_rate_factor(config: OptimizerConfig, update: int, *, updates: int) -> float:
    """Share of the peak learning rate at an update: linear warm-up, then constant, linear or cosine decay to 0."""
    warmup = min(config.warmup_updates, updates)
    if update < warmup:
        return (update + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (update - warmup) / max(1, updates - warmup)
    if config.schedule == "linear":
        return max(0.0, 1 - progress)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
