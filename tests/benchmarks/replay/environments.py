"""Environments of the peers, made once under a cache directory with pip; a peer that cannot be had says why."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PEERS = {
    "torchrl": {"packages": ["torchrl==0.14.1", "tensordict==0.14.3"], "inherit": True},
    "reverb": {"packages": ["dm-reverb[tensorflow]==0.14.0"], "inherit": False},
}
"""Packages by peer; `inherit` lends it this environment's packages (torch), so that they are not fetched again."""

INSTALL_TIMEOUT_S = 1200


class Unavailable(Exception):  # noqa: N818 - a state of affairs, not a bug
    """A peer cannot be installed or imported here; its text is the error."""


def cache_directory() -> Path:
    """Where environments are kept between runs."""
    base = os.environ.get("DDIL_BENCH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(base) / "ddil_dist" / "benchmarks"


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, made now if need be. Raises Unavailable."""
    plan = PEERS[peer]
    folder = cache_directory() / peer
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        venv.create(folder, with_pip=True, clear=True)
        if plan["inherit"]:
            site = next(folder.glob("lib/python*/site-packages"))
            (site / "inherit.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        command = [str(python), "-m", "pip", "install", "--quiet", *plan["packages"]]  # type: ignore[misc]
        result = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        if result.returncode:
            raise Unavailable(f"pip: {result.stderr.strip().splitlines()[-1]} (Python {sys.version.split()[0]})")
        done.touch()
    return python
