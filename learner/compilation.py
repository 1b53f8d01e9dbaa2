"""torch.compile of the networks in training.

In place: a network stays what it is, with the names of its parameters, and only its calls run compiled. So it is
checkpointed, published, averaged, sharded and resumed as any other, and a run may be resumed with or without.
"""

from __future__ import annotations

import torch
from torch import nn

from ddil_dist.compiling import require_compiler

GRAPHS = 64
"""All networks share one cache of graphs, which holds 8 by default; beyond that calls would quietly run as they are.
DMD2 with backward simulation has 10: two roles, with their gradients and without, by batches of several sizes."""


def compile_in_place(*networks: nn.Module, mode: str) -> None:
    """Let calls of the networks run compiled from the first on, which takes minutes; mode: `learner.compile`.

    The first size of a batch gets a graph of its own; if others come (a last, smaller micro-batch), one more serves
    them all. So where sizes differ, a resumed run may meet them in another order, and then goes on to the same figures
    to rounding only. Raises ConfigError where this machine has no compiler.
    """
    if mode == "no":
        return
    require_compiler("learner.compile", mode, place="worker")
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for network in networks:
        network.compile(mode=None if mode == "default" else mode)
