"""A publisher of its own process, to be killed: `python -m tests.weights.ray_publisher ADDRESS VERSION`.

Publishes to the board named "ddil/mine/weights", says so on standard output, and waits for its end on standard input.
"""

from __future__ import annotations

import sys

import ray
import torch

from ddil_dist.on_ray import NAMESPACE
from ddil_dist.weights import pack
from ddil_dist.weights.ray_store import RayWeightStore


def main(address: str, version: int) -> None:
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    board = ray.get_actor("ddil/mine/weights", namespace=NAMESPACE)
    weights = {"w": torch.full((300_000,), float(version))}
    RayWeightStore(board, timeout_s=20).publish(pack(weights, version=version, progress=0.5))
    print("published", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
