"""Checkpoints on disk: a directory an update, whole or absent, with a digest of every file.

A checkpoint is written into a staging directory, gets its manifest, and is renamed once it is whole, so a kill at any
moment leaves the last good one. Before one is used every file is held to its digest: a damaged
checkpoint is set aside, and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddil_dist.errors import CheckpointError, EnvironmentFailure
from learner.tensor_file import CHUNK_BYTES, Written, write_tensors

STAGING_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"
DAMAGED_SUFFIX = ".damaged"
MANIFEST_FILE = "manifest.json"

Parts = Mapping[str, Callable[[], Mapping[str, Tensor]]]

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run: `update_00000100/` and so on, the newest `keep` of them. One process writes."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory = directory
        self._keep = keep

    def write(self, update: int, parts: Parts, *, on_bytes: Callable[[int], None] = lambda num: None) -> Path:
        """Write a checkpoint, and remove the ones beyond `keep`; where it is.

        parts: by file name, without its suffix, what makes the tensors of the file; each is asked once, in its turn.
        on_bytes: told after every piece how many bytes were written. Raises CheckpointError where that cannot be; then
        nothing is left of it.
        """
        try:
            staged = self._stage(update)
            files = {}
            for name, part in parts.items():
                file = f"{name}.safetensors"
                files[file] = write_tensors(staged / file, part(), on_bytes=on_bytes)
            return self._commit(update, files)
        except OSError as error:
            shutil.rmtree(self._staged(update), ignore_errors=True)
            raise CheckpointError(
                f"{self.path(update)}: cannot be written ({error}); the last good checkpoint is "
                f"{self.newest() or 'none'}; make room on that disk, or look after it, and run again to resume"
            ) from error

    def _stage(self, update: int) -> Path:
        """A new, empty directory to write a checkpoint's files into; what killed attempts left is removed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for suffix in (STAGING_SUFFIX, REPLACED_SUFFIX):
            for left in self.directory.glob(f"*{suffix}"):
                shutil.rmtree(left)
        path = self._staged(update)
        path.mkdir()
        return path

    def _staged(self, update: int) -> Path:
        return self.path(update).with_suffix(STAGING_SUFFIX)

    def _commit(self, update: int, files: Mapping[str, Written]) -> Path:
        """Make a staged checkpoint real."""
        final, staged = self.path(update), self._staged(update)
        manifest = {"update": update, "files": {name: asdict(files[name]) for name in sorted(files)}}
        (staged / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (staged / MANIFEST_FILE, staged):
            _sync(path)
        if final.exists():
            final.replace(final.with_suffix(REPLACED_SUFFIX))
        staged.replace(final)
        _sync(self.directory)
        shutil.rmtree(final.with_suffix(REPLACED_SUFFIX), ignore_errors=True)
        for old in self.updates()[: -self._keep]:
            # Away under another name first: a directory that a kill left half removed must not look whole.
            gone = self.path(old).with_suffix(REPLACED_SUFFIX)
            self.path(old).replace(gone)
            shutil.rmtree(gone, ignore_errors=True)
        return final

    def updates(self) -> list[int]:
        """The updates of all checkpoints, oldest first."""
        found = self.directory.glob("update_*") if self.directory.is_dir() else ()
        return sorted(int(path.name.removeprefix("update_")) for path in found if path.is_dir() and not path.suffix)

    def newest(self) -> Path | None:
        """The newest checkpoint, unread; None if there is none."""
        updates = self.updates()
        return self.path(updates[-1]) if updates else None

    def newest_update(self) -> int | None:
        """The update of the newest checkpoint; None if there is none."""
        updates = self.updates()
        return updates[-1] if updates else None

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose every file is as it was written; None if there was never one.

        A damaged one is renamed to `*.damaged`, with a warning. Raises CheckpointError if all are damaged, and
        EnvironmentFailure where the storage does not let one be read, which says nothing about what it holds.
        """
        problem = ""
        for update in reversed(self.updates()):
            path = self.path(update)
            problem = find_damage(path)
            if not problem:
                return path
            if not path.is_dir():  # a living learner pruned it meanwhile, for newer ones
                return self.newest_whole()
            aside = path.with_suffix(DAMAGED_SUFFIX)
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
            logger.warning("checkpoint %s is damaged: %s; set aside as %s", path, problem, aside.name)
        damaged = sorted(self.directory.glob(f"*{DAMAGED_SUFFIX}")) if self.directory.is_dir() else []
        if damaged:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is whole; damaged are {', '.join(path.name for path in damaged)}"
                f"{f' ({problem})' if problem else ''}; restore one from a copy, or remove them to train from the start"
            )
        return None

    def is_whole(self, update: int) -> bool:
        """Whether there is a checkpoint of this update, as it was written; nothing is set aside."""
        return self.path(update).is_dir() and not find_damage(self.path(update))

    def path(self, update: int) -> Path:
        """Where the checkpoint of an update is or would be."""
        return self.directory / f"update_{update:08d}"


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint's files, in words; "" if every one is as the manifest says.

    Raises EnvironmentFailure where one cannot be read though it is there.
    """
    name = MANIFEST_FILE
    try:
        files = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        for name, wanted in files.items():
            size_bytes = (path / name).stat().st_size
            if size_bytes != wanted["size_bytes"]:
                return f"{name} has {size_bytes} bytes, not {wanted['size_bytes']}"
            if digest_of(path / name) != wanted["digest"]:
                return f"the content of {name} does not have the digest that it was written with"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        raise EnvironmentFailure(
            f"{path / name}: cannot be read ({error}), so that nobody knows whether it is whole; look after "
            "the storage and its permissions, and run again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    return ""


def digest_of(path: Path) -> str:
    """As `write_tensors` makes it. Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def averaged_weights(checkpoint: Path) -> Path:
    """The file of the student's averaged weights in a checkpoint: its own weights' where no average was kept."""
    average = checkpoint / "average.safetensors"
    return average if average.is_file() else checkpoint / "student.safetensors"


def load_weights(path: Path, load: Callable[[dict[str, Tensor]], object]) -> None:
    """Hand a safetensors file to a network's `load`; raises CheckpointError if it is missing, damaged or of another."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable weights file ({error})") from error
    try:
        load(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the {path.stem} ({error}); choose another run.name") from error
