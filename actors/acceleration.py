"""Faster ways to run the same network: channels-last weights, compiled kernels, CUDA graphs. Off unless asked for.

They fit the engine because its calls have one shape a policy. None changes the parameters' names or values, so new
weights are loaded into the network itself, and the accelerated one runs with them.
"""

from __future__ import annotations

import torch
from torch import nn

from ddil_dist.compiling import require_compiler
from ddil_dist.config import RolloutConfig
from ddil_dist.errors import ConfigError


def accelerated(network: nn.Module, config: RolloutConfig, device: torch.device) -> nn.Module:
    """The network as `rollout.channels_last` and `rollout.compile` want it run; its first call compiles, in minutes.

    Raises ConfigError where this machine cannot do that.
    """
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile == "no":
        return network
    if config.compile == "reduce-overhead" and device.type != "cuda":
        raise ConfigError(
            f"rollout.compile: 'reduce-overhead' records CUDA graphs, and this actor runs on the {device.type}; give "
            "it a GPU (rollout.num_gpus), or set rollout.compile=default"
        )
    require_compiler("rollout.compile", config.compile, place="actor")
    mode = None if config.compile == "default" else config.compile
    compiled = torch.compile(network, dynamic=False, mode=mode)
    assert isinstance(compiled, nn.Module)
    return compiled
