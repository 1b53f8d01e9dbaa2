"""Between a network and its published weights: which tensors are shipped, and how a network takes them over."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from ddil_dist.errors import WeightsError
from ddil_dist.weights.flat import PackedWeights, in_threads, unpack


def published_names(network: nn.Module) -> tuple[str, ...]:
    """Names, in the state dict, of what must be shipped so that another copy of the network can follow this one.

    The trained parameters (all of them where none is frozen or none is trained; an adapter's alone where it is trained
    on a frozen network), and every floating-point buffer, since a buffer does not say whether training moves it.
    Integers, such as counts of batches, stay: they would not survive the cast, and inference does not read them.
    Ask before `requires_grad` is changed for any other reason than what is trained.
    """
    state = network.state_dict(keep_vars=True)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    trained = {name for name in parameters & state.keys() if state[name].requires_grad}
    left_out = parameters - trained if trained else set()
    return tuple(name for name, tensor in _floating(state).items() if name not in left_out)


def published_weights(network: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors to pack, by name: `names`, or `published_names(network)`. They share the network's memory."""
    state = _floating(network.state_dict())
    return {name: state[name] for name in (published_names(network) if names is None else names)}


def apply(packed: PackedWeights, network: nn.Module, names: Collection[str] | None = None) -> None:
    """Copy a version into the network's tensors in place, cast to their dtype, on their device.

    names: what must have been shipped, no more and no less; `published_names(network)` if None. Raises WeightsError,
    before the first tensor is written, if a name or shape differs or if the buffer is torn.
    """
    targets = published_weights(network, names)
    _compare(packed, targets)
    weights = unpack(packed)
    order = sorted(weights, key=lambda name: -weights[name].numel())  # the largest first: threads end together
    in_threads(lambda name: targets[name].copy_(weights[name]), order)


def _compare(packed: PackedWeights, targets: dict[str, Tensor]) -> None:
    def refuse(difference: str) -> WeightsError:
        return WeightsError(
            f"weights version {packed.version.version}: {difference}; nothing was applied: the learner and this "
            "process must build the student from the same configuration and release"
        )

    shipped = dict(packed.layout)
    for name, shape in packed.layout:
        if name not in targets:
            raise refuse(f"{name} {list(shape)} is shipped, but the network does not take it")
        if tuple(targets[name].shape) != shape:
            raise refuse(f"{name} is shipped as {list(shape)}, but is {list(targets[name].shape)} in the network")
    for name, target in targets.items():
        if name not in shipped:
            raise refuse(f"{name} {list(target.shape)} of the network is not shipped")


def _floating(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
