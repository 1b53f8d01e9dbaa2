"""AdamW from the configuration, and the learning rate as a function of the update."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ddil_dist.config import OptimizerConfig
from ddil_dist.errors import ConfigError


def create_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer; its learning rate is set before every step, from `learning_rate`.

    Raises ConfigError where it needs a package that is not installed.
    """
    parameters = list(parameters)
    if config.type == "adamw_8bit":
        return _adamw_8bit(parameters, config)
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True if config.type == "adamw_fused" else None,
    )


def _adamw_8bit(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"learner.optimizer.type: 'adamw_8bit' needs the package bitsandbytes, which does not import ({error}); "
            "install it on every learner worker, or choose adamw or adamw_fused"
        ) from error
    optimizer = bitsandbytes.optim.AdamW8bit(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def learning_rate(config: OptimizerConfig, update: int, *, updates: int) -> float:
    """The learning rate of an update, from 0, of `updates`.

    It follows from the configuration and the update alone, so that nothing of a schedule has to be saved, and a
    resumed run obeys what is configured now.
    """
    return config.learning_rate * learning_rate_factor(config, update, updates=updates)


def learning_rate_factor(config: OptimizerConfig, update: int, *, updates: int) -> float:
    """Share of the peak learning rate at an update: linear warm-up, then constant, linear or cosine decay to 0.

    All of it begins anew at each of `config.restarts`, and is over by the next.
    """
    # A restart falls on the first update at or after its share, as a part of the sampling prior begins.
    begins = [0, *(math.ceil(share * updates - 1e-6) for share in config.restarts), updates]
    span = max((i for i, begin in enumerate(begins[:-1]) if begin <= update), default=0)
    update, updates = update - begins[span], begins[span + 1] - begins[span]
    warmup = min(config.warmup_updates, updates)
    if update < warmup:
        return (update + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (update - warmup) / max(1, updates - warmup)
    if config.schedule == "linear":
        return max(0.0, 1 - progress)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
