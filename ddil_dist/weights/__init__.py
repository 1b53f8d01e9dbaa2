"""Student weights in transit: one flat, hashed buffer a version, published by the learner and pulled by actors."""

from ddil_dist.weights.flat import PackedWeights, Packer, pack, unpack
from ddil_dist.weights.network import apply, published_names, published_weights
from ddil_dist.weights.store import InMemoryWeightStore, WeightStore

__all__ = [
    "InMemoryWeightStore",
    "PackedWeights",
    "Packer",
    "WeightStore",
    "apply",
    "pack",
    "published_names",
    "published_weights",
    "unpack",
]
