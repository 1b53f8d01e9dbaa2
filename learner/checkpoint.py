"""Checkpoints on disk: a directory an update, whole or absent.

A checkpoint is written into a staging directory and renamed once every worker has written its part, so a kill at any
moment leaves the last good one. Tensors are safetensors; optimizer and generator states are read with
`weights_only=True`, so nothing is ever unpickled into code.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ddil_dist.errors import CheckpointError

STAGING_SUFFIX = ".partial"


class CheckpointStore:
    """The checkpoints of one run: `update_00000100/` and so on, the newest `keep` of them."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._keep = keep

    def stage(self, update: int) -> Path:
        """A directory to write a checkpoint's files into; every worker may call it; a killed attempt's is reused."""
        path = self._path(update).with_suffix(STAGING_SUFFIX)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, update: int) -> Path:
        """Make a staged checkpoint real, and remove the ones beyond `keep`."""
        final = self._path(update)
        staged = final.with_suffix(STAGING_SUFFIX)
        for file in staged.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():
            shutil.rmtree(final)
        staged.replace(final)
        for old in self._all()[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def newest(self) -> Path | None:
        """The newest whole checkpoint; None if there is none."""
        found = self._all()
        return found[-1] if found else None

    def newest_update(self) -> int | None:
        """The update of the newest whole checkpoint; None if there is none."""
        newest = self.newest()
        return None if newest is None else int(newest.name.removeprefix("update_"))

    def _path(self, update: int) -> Path:
        return self._directory / f"update_{update:08d}"

    def _all(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return sorted(
            path for path in self._directory.glob("update_*") if path.is_dir() and path.suffix != STAGING_SUFFIX
        )


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a nested state of tensors and plain values."""
    torch.save(state, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; raises CheckpointError if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums
                raise zipfile.BadZipFile("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what it likes
        raise CheckpointError(f"{path}: not a readable checkpoint file ({error}); remove its directory") from error
    assert isinstance(state, dict)
    return state


def load_weights(path: Path, network: nn.Module) -> None:
    """Read a safetensors file into a network; raises CheckpointError if it is missing, damaged or of another."""
    weights = read_weights(path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the {path.stem} ({error}); choose another run.name") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises CheckpointError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable weights file ({error}); remove its directory") from error
