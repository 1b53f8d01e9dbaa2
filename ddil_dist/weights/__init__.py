"""Student weights in transit: one flat, hashed buffer a version, published by the learner and pulled by actors.

The store alone knows which version is the newest; all others ask it or are told by who publishes. The learner's
`Publisher` packs a version (`flat`), hands it to the store (`store`; on a cluster `ray_store`) and notes it with the
replay buffer, whose ages count from it. An actor's `Rollout.refresh` asks the store, loads, and applies (`flat`).
"""

from ddil_dist.weights.flat import PackedWeights, Packer, apply, pack, published_names, published_weights, unpack
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
