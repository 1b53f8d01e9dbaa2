"""Which files at `data.path` are the data, and in which format: read from their names, as people lay data out.

A repository has a card, licences and several splits beside the files that are meant; a tool has its own records there.
What img2dataset notes of a shard lies beside it, NAME.parquet and NAME_stats.json beside NAME.tar or the folder NAME.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ddil_dist.config import DataConfig
from ddil_dist.data.places import Remote, fetch, list_remote, matches, target_directory
from ddil_dist.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
METADATA = ("metadata.jsonl", "metadata.csv")

SUFFIXES: dict[str, frozenset[str]] = {
    "parquet": frozenset({".parquet"}),
    "webdataset": frozenset({".tar"}),
    "arrow": frozenset({".arrow"}),
    "folder": IMAGE_SUFFIXES,
}
"""Of each format, the one that is taken first where several are found."""

SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"})
"""What is taken for a split's name in a file's."""

POINTER = b"version https://git-lfs.github.com/spec/v1"
POINTER_BYTES = 1024
"""A git-lfs pointer is smaller."""


@dataclass(frozen=True)
class Layout:
    """Files of one format at or below `root`, in order. For arrow, whose splits are folders, all splits' files."""

    root: Path
    kind: str
    files: tuple[Path, ...]


def find_layout(path: Path, config: DataConfig) -> Layout:
    """The files of `data.split` at an existing path; raises DataError where none are, saying what was found."""
    if path.is_file():
        kind = next((kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), "parquet")
        found = Layout(path, kind if config.format == "auto" else config.format, (path,))
    else:
        found = _in_directory(path, config)
    if found.kind != "folder":
        _refuse_pointers(found.files)
    return found


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins so is what git-lfs leaves where a file has not been fetched."""
    return start.startswith(POINTER)


def describe(names: Iterable[str]) -> str:
    """How many files there are of each suffix, the commonest first: "12 .svg, 1 .md"."""
    counts = Counter(Path(name).suffix.lower() or "without a suffix" for name in names)
    return ", ".join(f"{num} {suffix}" for suffix, num in counts.most_common(6)) or "no files"


def pattern_layout(pattern: str, config: DataConfig) -> Layout:
    """The local files of a pattern, whatever splits their names are of: they were chosen."""
    files = matches(pattern)
    root = Path(os.path.commonpath([file.parent for file in files]))
    kind, chosen = _select(root, files, config, by_split=False)
    found = Layout(root, kind, tuple(chosen))
    _refuse_pointers(found.files)
    return found


def fetch_layout(path: str, config: DataConfig) -> Layout:
    """The files at an address, or that commands print, fetched into `data.download` where they are meant."""
    found, remote = list_layout(path, config)
    fetch([remote[file] for file in found.files], found.files, timeout_s=config.fetch_timeout_s)
    return found


def list_layout(path: str, config: DataConfig) -> tuple[Layout, Mapping[Path, Remote]]:
    """The files at an address as they will lie in `data.download`, where they are meant; and where each comes from."""
    assert config.download is not None, "checked as the run was launched"
    files = list_remote(path, timeout_s=config.fetch_timeout_s)
    names = [PurePosixPath(file.name) for file in files]
    above = os.path.commonpath([name.parent for name in names])
    root = target_directory(config.download, path)
    targets = {root / name.relative_to(above): file for name, file in zip(names, files, strict=True)}
    kind, chosen = _select(root, sorted(targets), config, by_split=not any(sign in path for sign in "{*["))
    return Layout(root, kind, tuple(chosen)), targets


def _in_directory(path: Path, config: DataConfig) -> Layout:
    files = sorted(file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)) and file.is_file())
    kind, chosen = _select(path, files, config)
    return Layout(path, kind, tuple(chosen))


def _select(root: Path, files: list[Path], config: DataConfig, *, by_split: bool = True) -> tuple[str, list[Path]]:
    """Format and those files, by their names alone."""
    noted = _metadata_of_tools(files)
    by_kind = {
        kind: [file for file in files if file.suffix.lower() in suffixes and file not in noted]
        for kind, suffixes in SUFFIXES.items()
    }
    kind = next((kind for kind, found in by_kind.items() if found), None) if config.format == "auto" else config.format
    if kind is not None and not by_kind[kind] and kind == "parquet":
        by_kind[kind] = files  # it was said to be Parquet, whatever its name
    if kind is None or not by_kind[kind]:
        raise DataError(
            f"data.path: {str(root)!r} has no {'data' if kind is None else kind + ' data'} in it: "
            f"{describe(file.name for file in files)}; give Parquet, tar shards, a saved data set, or images of the "
            f"formats {' '.join(sorted(IMAGE_SUFFIXES))} with their captions"
        )
    if kind == "arrow" or not by_split:
        return kind, by_kind[kind]
    return kind, _of_split(root, by_kind[kind], config.split, folders_only=kind == "folder")


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith((".", "_")) for part in relative.parts)


def _metadata_of_tools(files: Sequence[Path]) -> set[Path]:
    """Parquet files that stand beside a shard, or a folder, of their own name."""
    owners = {file.with_suffix("") for file in files if file.suffix.lower() == ".tar"} | {file.parent for file in files}
    return {file for file in files if file.suffix.lower() == ".parquet" and file.with_suffix("") in owners}


def _of_split(root: Path, files: list[Path], split: str, *, folders_only: bool) -> list[Path]:
    """The files of a split, or those that name none; raises DataError if all name others."""
    splits = {file: _split_of(file.relative_to(root), split, folders_only=folders_only) for file in files}
    for wanted in (split, None):
        chosen = [file for file in files if splits[file] == wanted]
        if chosen:
            return chosen
    raise DataError(
        f"data.split: {str(root)!r} has no files of a split {split!r}; it has {sorted(set(map(str, splits.values())))}"
    )


def _split_of(relative: Path, wanted: str, *, folders_only: bool) -> str | None:
    """The split that a file's folder or name gives it: train-00000-of-00002.parquet, cc-train-7.tar."""
    known = SPLITS | {wanted}
    folder = next((part for part in relative.parts[:-1] if part in known), None)
    if folder is not None or folders_only:
        return folder
    words = re.split(r"[-. ]", re.sub(r"-\d{5}-of-\d{5}$", "", relative.stem))
    names = [relative.stem, *(re.sub(r"_?\d+$", "", word) for word in words)]
    return next((name for name in names if name in known), None)


def _refuse_pointers(files: Sequence[Path]) -> None:
    for file in files:
        if file.stat().st_size < POINTER_BYTES and is_pointer(file.read_bytes()):
            raise DataError(
                f"data.path: {str(file)!r} is a git-lfs pointer, not the file itself; fetch the files with "
                "git lfs pull in the repository"
            )
