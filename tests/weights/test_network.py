"""Which tensors of a network are shipped, and that a network takes over exactly these or nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ddil_dist.errors import WeightsError
from ddil_dist.weights import apply, pack, published_names, published_weights

ADAPTER = ("adapter.down.weight", "adapter.up.weight", "norm.running_mean", "norm.running_var")


class Network(nn.Module):
    """A base, an adapter beside it, and a norm with moving buffers and an integer count."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(6, 4)
        self.adapter = nn.ModuleDict({"down": nn.Linear(6, 2, bias=False), "up": nn.Linear(2, 4, bias=False)})
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.register_buffer("table", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.base(x) + self.adapter["up"](self.adapter["down"](x)))
        assert isinstance(out, torch.Tensor)
        return out


def adapted(seed: int) -> Network:
    network = Network(seed)
    network.base.requires_grad_(False)
    return network


def values(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def test_all_of_a_network_that_is_trained_whole_is_shipped() -> None:
    everything = ("base.weight", "base.bias", *ADAPTER)
    assert published_names(Network(0)) == everything
    assert published_names(Network(0).requires_grad_(False)) == everything, "a network that only runs takes it all"


def test_of_a_frozen_network_only_what_is_trained_and_its_buffers_are_shipped() -> None:
    network = adapted(0)
    assert published_names(network) == ADAPTER
    shipped = published_weights(network)
    assert tuple(shipped) == ADAPTER
    assert pack(shipped, version=1, progress=0.0).version.size_bytes == 4 * (12 + 8 + 4 + 4)
    names = published_names(network)
    network.requires_grad_(False)  # as in a phase that trains another network
    assert tuple(published_weights(network, names)) == ADAPTER


@pytest.mark.parametrize("of", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("to", ["float32", "bfloat16", "float16"])
def test_an_adapter_is_taken_over_in_place_in_the_networks_dtype(of: str, to: str) -> None:
    learner, actor = adapted(0), adapted(1).to(getattr(torch, to))
    names = published_names(actor)
    actor.requires_grad_(False)
    before, memory = values(actor), [tensor.data_ptr() for tensor in actor.state_dict().values()]
    apply(pack(published_weights(learner), version=1, progress=0.0, dtype=of), actor, names)
    after = values(actor)
    for name, tensor in learner.state_dict().items():
        if name in ADAPTER:
            assert torch.equal(after[name], tensor.to(getattr(torch, of)).to(getattr(torch, to))), name
        else:
            assert torch.equal(after[name], before[name]), name
        assert after[name].dtype == before[name].dtype
    assert [tensor.data_ptr() for tensor in actor.state_dict().values()] == memory


def test_a_trained_network_takes_over_and_trains_on() -> None:
    source, target = Network(0), Network(1)
    apply(pack(published_weights(source), version=1, progress=0.0), target)
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    assert torch.equal(target.eval()(x), source.eval()(x))
    target(x).sum().backward()
    assert target.base.weight.grad is not None


def test_a_transposed_parameter_is_taken_over() -> None:
    source, target = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
    target.weight = nn.Parameter(target.weight.detach().t())
    apply(pack(published_weights(source), version=1, progress=0.0), target)
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize(
    ("shipped", "message"),
    [
        ({"base.weight": (4, 6), "more": (3,)}, r"more \[3\] is shipped, but the network does not take it"),
        (
            {"base.weight": (6, 4), "base.bias": (4,)},
            r"base.weight is shipped as \[6, 4\], but is \[4, 6\] in the network",
        ),
        ({"base.weight": (4, 6), "norm.running_mean": (4,)}, r"base.bias \[4\] of the network is not shipped"),
    ],
)
def test_a_mismatch_names_the_first_tensor_that_differs_and_writes_nothing(
    shipped: dict[str, tuple[int, ...]], message: str
) -> None:
    network = Network(0)
    before = values(network)
    packed = pack({name: torch.ones(shape) for name, shape in shipped.items()}, version=9, progress=0.0)
    with pytest.raises(WeightsError, match=rf"version 9: {message}; nothing was applied"):
        apply(packed, network)
    assert all(torch.equal(value, before[name]) for name, value in values(network).items())


def test_whole_weights_are_refused_by_an_adapters_reader_and_the_reverse() -> None:
    whole, adapter = Network(0), adapted(1)
    with pytest.raises(WeightsError, match=r"base.weight \[4, 6\] is shipped, but the network does not take it"):
        apply(pack(published_weights(whole), version=1, progress=0.0), adapter)
    with pytest.raises(WeightsError, match=r"base.weight \[4, 6\] of the network is not shipped"):
        apply(pack(published_weights(adapter), version=1, progress=0.0), whole)


def test_a_torn_version_writes_nothing() -> None:
    network = Network(0)
    before = values(network)
    packed = pack(published_weights(Network(1)), version=1, progress=0.0)
    buffer = packed.buffer.copy()
    buffer[-1] ^= 1
    with pytest.raises(WeightsError, match="torn and was not applied"):
        apply(replace(packed, buffer=buffer), network)
    assert all(torch.equal(value, before[name]) for name, value in values(network).items())
