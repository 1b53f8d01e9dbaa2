"""Data that a path does not name alone: patterns, addresses, and the output of commands, as files on this machine.

/data/{00000..01210}.tar    braces, as shells and webdataset have them
/data/train-*.parquet       globs
file:///data/shards         a path
s3:// gs:// https:// ...    what fsspec reads: files, patterns, and folders where the storage lists them
pipe:aws s3 cp s3://b/{000..127}.tar -    commands, a shard each; only with `data.pipe`

What lies elsewhere is fetched into `data.download` once, whole, and is then read at random like any file: so an order
is its seed's, and a resumed run goes on in it. A file is there whole or not at all. Imports no torch.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ddil_dist.errors import DataError

PIPE = "pipe:"
FILE = "file://"
FETCHES = 8
"""Files that a process fetches at a time."""
BLOCK_BYTES = 2**22

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """A file elsewhere. name: for people and for its copy, without credentials; write: copies its content."""

    name: str
    write: Callable[[BinaryIO], None]


def is_remote(path: str) -> bool:
    """Whether what is named has to be fetched."""
    return path.startswith(PIPE) or ("://" in path and not path.startswith(FILE))


def is_pattern(path: str) -> bool:
    """Whether a local path has braces or wildcards, and no file of just that name is there."""
    return not is_remote(path) and any(sign in path for sign in "{*?[") and not Path(path).exists()


def local(path: str) -> str:
    """A path that is written as file://, as a path."""
    return path.removeprefix(FILE)


def expand_braces(pattern: str) -> list[str]:
    """{00000..01210} by numbers, with leading zeros as they are written, and {a,b} by its parts; all products."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def matches(pattern: str) -> list[Path]:
    """The local files of a pattern, in order; raises DataError where a name of it has none."""
    names = expand_braces(pattern)
    found = [[Path(match) for match in sorted(glob.glob(name, recursive=True))] for name in names]  # noqa: PTH207
    missing = [name for name, files in zip(names, found, strict=True) if not files]
    if missing:
        raise DataError(
            f"data.path: {len(missing)} of the {len(names)} names in {pattern!r} have no file, the first {missing[0]!r}"
        )
    places = dict.fromkeys(itertools.chain.from_iterable(found))
    return [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]


def check_remote(path: str, *, pipe: bool, download: Path | None) -> None:
    """Raises DataError for what could not be fetched, without asking anybody: a key or a package is missing."""
    if path.startswith(PIPE):
        if not pipe:
            raise DataError(
                "data.path: pipe: runs a command on every machine that reads the data; allow it by data.pipe=true"
            )
    else:
        _file_system(path)
    if download is None:
        raise DataError(
            f"data.download: {without_secrets(path)!r} is fetched before it is read; name a directory with room for it"
        )


def list_remote(path: str, *, timeout_s: float) -> list[Remote]:
    """The files of an address, or of commands, in order; raises DataError where there are none."""
    if path.startswith(PIPE):
        commands = expand_braces(path.removeprefix(PIPE))
        return [
            Remote(f"{number:05d}-{_digest(command)}.tar", partial(_run, command, timeout_s))
            for number, command in enumerate(commands)
        ]
    files: list[Remote] = []
    system = _file_system(path)
    for url in expand_braces(path):
        try:
            found = _found(system, url)
        except Exception as error:  # every storage has errors of its own
            raise DataError(f"data.path: {without_secrets(url)!r} cannot be listed: {_reason(error, url)}") from error
        if not found:
            raise DataError(f"data.path: there is no file at {without_secrets(url)!r}")
        files += [Remote(without_secrets(name), partial(_copy, system, name, timeout_s)) for name in found]
    return files


def fetch(files: Sequence[Remote], targets: Sequence[Path], *, timeout_s: float) -> None:
    """Fetch the files that are not there; raises DataError, naming the file, where one cannot be had in `timeout_s`.

    Processes of a machine may call it at once: a file is fetched by one of them.
    """
    missing = [(file, target) for file, target in zip(files, targets, strict=True) if not target.exists()]
    if missing:
        logger.warning("data: fetching %d of %d files into %s", len(missing), len(files), missing[0][1].parent)
    with ThreadPoolExecutor(FETCHES) as pool:
        for _ in pool.map(lambda pair: _fetch_one(*pair, timeout_s=timeout_s), missing):
            pass


def without_secrets(url: str) -> str:
    """An address without user, password and query, which may be credentials; of a command nothing is told."""
    if url.startswith(PIPE):
        return PIPE
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.scheme else url.partition("?")[0]


def _choices(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = numbers.groups()
    step = 1 if int(first) <= int(last) else -1
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def _file_system(url: str) -> Any:
    import fsspec

    scheme = urlsplit(url).scheme
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(scheme)
        remedy = f"install {package}" if package else str(error)
        raise DataError(f"data.path: {scheme}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise DataError(f"data.path: {scheme}:// is not known: {error}") from error


def _found(system: Any, url: str) -> list[str]:
    """The files of one address, as the file system names them."""
    path = str(system._strip_protocol(url))
    if any(sign in urlsplit(url).path for sign in "*["):
        return sorted(map(str, system.glob(path)))
    if PurePosixPath(urlsplit(url).path).suffix:
        return [path]
    return sorted(map(str, system.find(path)))


def _fetch_one(file: Remote, target: Path, *, timeout_s: float) -> None:
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f"{target.name}.partial")
    try:
        with FileLock(f"{target}.lock", timeout=timeout_s):
            if target.exists():
                return
            with staged.open("wb") as sink:
                file.write(sink)
            staged.replace(target)
    except Timeout as error:
        raise DataError(
            f"data.path: {file.name!r} was not fetched by another process within {timeout_s:g} s (data.fetch_timeout_s)"
        ) from error
    finally:
        if not target.exists():
            staged.unlink(missing_ok=True)


def _copy(system: Any, name: str, timeout_s: float, sink: BinaryIO) -> None:
    deadline = time.monotonic() + timeout_s
    shown = without_secrets(name)
    try:
        with system.open(name, "rb") as source:
            while block := source.read(BLOCK_BYTES):
                sink.write(block)
                if time.monotonic() > deadline:
                    raise DataError(f"data.path: {shown!r} took more than {timeout_s:g} s (data.fetch_timeout_s)")
    except DataError:
        raise
    except Exception as error:  # every storage has errors of its own
        raise DataError(f"data.path: {shown!r} cannot be fetched: {_reason(error, name)}") from error


def _run(command: str, timeout_s: float, sink: BinaryIO) -> None:
    """Write what a command prints; its children end with it."""
    process = subprocess.Popen(command, shell=True, stdout=sink, stderr=subprocess.PIPE, start_new_session=True)  # noqa: S602
    try:
        _, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise DataError(
            f"data.path: a command of pipe: took more than {timeout_s:g} s (data.fetch_timeout_s)"
        ) from error
    if process.returncode != 0:
        said = errors.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise DataError(f"data.path: a command of pipe: ended with {process.returncode}; it said: {said[0]}")


def _reason(error: Exception, url: str) -> str:
    return f"{type(error).__name__}: {str(error).replace(url, without_secrets(url))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def target_directory(download: Path, path: str) -> Path:
    """Where the files of an address go: a folder of its own."""
    return download / _digest(without_secrets(path) if not path.startswith(PIPE) else path)
