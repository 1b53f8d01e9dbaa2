"""What torch.compile needs of a machine, and how it is kept out of where it would not pay."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch

from ddil_dist.errors import ConfigError


def require_compiler(key: str, mode: str, *, place: str) -> None:
    """Raises ConfigError where there is no C++ compiler, which every backend of torch.compile calls.

    key, mode: of the configuration, such as "rollout.compile"; place: whose PATH is looked through.
    """
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"{key}: {mode!r} needs a C++ compiler, and there is no {compiler} on this {place}'s PATH; install one, "
            f"name one in CXX, or set {key}=no"
        )


def eagerly(mode: str) -> AbstractContextManager[object]:
    """Within the block networks that were compiled in `mode` ("no": none was) run as they are, and compile nothing."""
    return nullcontext() if mode == "no" else torch.compiler.set_stance("force_eager")
