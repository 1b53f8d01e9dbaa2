"""Student weights in transit: one flat, hashed buffer a version, published by the learner and pulled by actors."""

from ddil_dist.weights.flat import PackedWeights, pack, unpack
from ddil_dist.weights.store import InMemoryWeightStore, WeightStore

__all__ = ["InMemoryWeightStore", "PackedWeights", "WeightStore", "pack", "unpack"]
