"""A network as a frozen base and a trainable low-rank adapter (LoRA, Hu et al. 2022), through peft.

Any number of networks stand on one base: each has a tree of modules of its own, so none has to be switched on or off,
but the base's parameters in it are the base's very tensors. A network costs its adapter and no more.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ddil_dist.config import LoraConfig
from ddil_dist.errors import ConfigError

ADAPTER = "default"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The name that `load_lora_weights` looks for in a directory."""
FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}
"""kohya's names of the two factors, by peft's."""
ADAPTER_PART = ".lora_"
"""In the names of an adapter's parameters, and of no others."""


class LoraNetwork(nn.Module):
    """A U-Net with an adapter. As a module it is the adapter alone: parameters, state dict, device and precision.

    So whatever trains, averages, publishes or saves it handles the adapter's few parameters, in float32 at first. The
    base stays as and where it is, and it must not be converted afterwards: `to` on this module leaves it alone.
    """

    def __init__(self, base: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        self.base_dtype = next(base.parameters()).dtype
        """The base's precision, which is that of inputs and outputs."""
        unet = share(base)
        _inject(unet, config)
        self._hold(unet)
        self.float()

    @property
    def unet(self) -> nn.Module:
        """The diffusers U-Net inside, adapter included, for hooks on its blocks."""
        return self._unet[0]

    @property
    def config(self) -> Mapping[str, Any]:
        """The U-Net's configuration."""
        config: Mapping[str, Any] = self.unet.config  # type: ignore[assignment]
        return config

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.unet(*args, **options)

    def train(self, mode: bool = True) -> LoraNetwork:
        self.unet.train(mode)
        super().train(mode)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Keep no activations of the U-Net's blocks but recompute them."""
        self.unet.enable_gradient_checkpointing()  # type: ignore[operator]

    def merged(self) -> nn.Module:
        """A stock float32 U-Net with the adapter added to its weights; shares no memory with this network."""
        unet = type(self.unet).from_config({k: v for k, v in self.config.items() if not k.startswith("_")})  # type: ignore[attr-defined]
        own = {name: tensor.float() for name, tensor in self.unet.state_dict().items()}
        weights = {name.replace(".base_layer.", "."): t for name, t in own.items() if ADAPTER_PART not in name}
        for name, module in self.unet.named_modules():
            if hasattr(module, "get_delta_weight"):
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.get_delta_weight(ADAPTER).float()
        unet.load_state_dict(weights)
        assert isinstance(unet, nn.Module)
        return unet

    def _hold(self, unet: nn.Module) -> None:
        """Keep `unet` without registering it, and register the adapter's parameters under the names they have there."""
        self._unet = (unet,)
        for name, parameter in unet.named_parameters():
            if ADAPTER_PART in name:
                *path, leaf = name.split(".")
                parent: nn.Module = self
                for part in path:
                    if part not in parent._modules:
                        parent.add_module(part, nn.Module())
                    parent = parent.get_submodule(part)
                parent.register_parameter(leaf, parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraNetwork:
        """Another adapter of the same values on the same base."""
        twin = LoraNetwork.__new__(LoraNetwork)
        nn.Module.__init__(twin)
        twin.base_dtype = self.base_dtype
        base = {id(p): p for name, p in self.unet.named_parameters() if ADAPTER_PART not in name}
        twin._hold(copy.deepcopy(self.unet, base))
        return twin.train(self.training)


def inner_unet(network: nn.Module) -> nn.Module:
    """The diffusers U-Net that a network is, or that an adapter is part of."""
    return network.unet if isinstance(network, LoraNetwork) else network


def share(network: nn.Module) -> nn.Module:
    """A module tree of its own over the very parameters and buffers of `network`."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def save_adapter(network: LoraNetwork, directory: Path) -> None:
    """Write the adapter for `pipeline.load_lora_weights(directory)` on the stock base pipeline, and for other programs.

    The names are those of kohya's scripts on diffusers' modules, which diffusers, ComfyUI and AUTOMATIC1111's all take;
    of diffusers' own, others take a part, and give half an adapter without a word.
    """
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(network.unet, adapter_name=ADAPTER)
    config: Any = network.unet.peft_config[ADAPTER]  # type: ignore[index]
    tensors = {kohya_name(name): tensor.detach().cpu().contiguous() for name, tensor in layers.items()}
    for name in {name.partition(".")[0] for name in tensors}:
        tensors[f"{name}.alpha"] = torch.tensor(float(config.lora_alpha))
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})


def kohya_name(name: str) -> str:
    """The name of an adapter's factor in kohya's layout, from peft's.

    "mid_block.attentions.0.proj_in.lora_A.weight" is "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight".
    """
    module, factor, _ = name.rsplit(".", 2)
    return f"lora_unet_{module.replace('.', '_')}.{FACTORS[factor]}.weight"


def _inject(unet: nn.Module, config: LoraConfig) -> None:
    """Give `unet` an adapter that changes nothing yet, its only trainable parameters."""
    import peft

    unet.requires_grad_(False)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        target_modules=list(config.targets),
        init_lora_weights=True,
    )
    try:
        unet.add_adapter(settings, adapter_name=ADAPTER)  # type: ignore[operator]
    except ValueError as error:
        raise ConfigError(
            f"student.lora.targets: {list(config.targets)} fit no module of the teacher's U-Net ({error}); give ends "
            "of the names of its linear and convolution layers, such as to_q"
        ) from error
