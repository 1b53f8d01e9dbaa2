"""Patterns, addresses and commands: the files that they name, fetched once and whole."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from ddil_dist.config import DataConfig, load_config
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.data.places import Remote, expand_braces, fetch
from ddil_dist.errors import DataError
from ddil_dist.launch.prepare import settle_paths
from ddil_dist.sources import resolve_data
from tests.data.support import encoded

RED = encoded((255, 0, 0))


def shard(*captions: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, caption in enumerate(captions):
            for suffix, content in (("png", RED), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    directory = tmp_path / "shards"
    directory.mkdir()
    for number in range(12):
        (directory / f"{number:05d}.tar").write_bytes(shard(f"caption {number}"))
    return directory


def opened(path: str, **settings: Any) -> ImageTextData:
    return ImageTextData.open(DataConfig(path=path, **settings), image_size=8)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{00008..00010}.tar", ["00008.tar", "00009.tar", "00010.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{10..8}", ["10", "9", "8"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("awk '{print}'", ["awk '{print}'"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("pattern", ["{00003..00005}.tar", "0000[345].tar", "{00003,0000[45]}.tar"])
def test_local_patterns_name_their_files(shards: Path, scheme: str, pattern: str) -> None:
    assert opened(f"{scheme}{shards}/{pattern}").captions() == ["caption 3", "caption 4", "caption 5"]


def test_file_addresses_are_paths(shards: Path) -> None:
    assert opened(f"file://{shards}").captions() == opened(str(shards)).captions()


def test_a_pattern_chooses_whatever_the_split(shards: Path) -> None:
    (shards / "00003.tar").rename(shards / "test-00003.tar")
    assert opened(f"{shards}/test-*.tar").captions() == ["caption 3"]


def test_what_a_pattern_names_and_is_not_there_is_told_before_any_work(shards: Path) -> None:
    config = DataConfig(path=f"{shards}/{{00010..00013}}.tar")
    with pytest.raises(DataError, match=r"2 of the 4 names in .* have no file, the first '.*00012\.tar'"):
        resolve_data(config)


def test_a_relative_pattern_is_the_launchers(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    config = settle_paths(load_config(None, ["data.path=0000*.tar"]))
    assert config.data.path == f"{shards}/0000*.tar"


@pytest.fixture
def storage() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def put(system: Any, **files: bytes) -> None:
    for name, content in files.items():
        system.pipe_file(f"/bucket/{name.replace('_', '-')}.tar", content)


def test_an_address_is_fetched_once_and_read_at_random(storage: Any, tmp_path: Path) -> None:
    put(storage, train_0=shard("a", "b", "c"), train_1=shard("d"), test_0=shard("t"))
    storage.pipe_file("/bucket/README.md", b"# card")
    data = opened("memory://bucket", download=tmp_path)
    assert data.captions() == ["a", "b", "c", "d"]
    assert data.images([3, 0])[1] == ["d", "a"]
    assert not list(tmp_path.rglob("test*")), "the other split's files are not fetched"
    storage.store.clear()
    put(storage, train_0=b"", train_1=b"", test_0=b"")
    again = opened("memory://bucket", download=tmp_path)
    assert again.captions() == ["a", "b", "c", "d"]
    orders = [found.shuffled(np.random.default_rng(3)).tolist() for found in (data, again)]
    assert orders[0] == orders[1], "so a resumed run goes on where it was"


@pytest.mark.parametrize("pattern", ["train-{0..1}.tar", "train-*.tar"])
def test_patterns_of_an_address(storage: Any, tmp_path: Path, pattern: str) -> None:
    put(storage, train_0=shard("a"), train_1=shard("b"), train_x2=b"")
    if "*" in pattern:
        storage.rm("/bucket/train-x2.tar")
    assert opened(f"memory://bucket/{pattern}", download=tmp_path).captions() == ["a", "b"]


def test_what_is_not_at_an_address_is_named_and_leaves_nothing(storage: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'/bucket/no\.tar' cannot be fetched: FileNotFoundError"):
        opened("memory://bucket/no.tar", download=tmp_path)
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_shards_of_a_web_server(server: str, tmp_path: Path) -> None:
    captions = opened(f"{server}/{{00003..00005}}.tar?key=secret", download=tmp_path / "d").captions()
    assert captions == ["caption 3", "caption 4", "caption 5"]
    with pytest.raises(DataError, match=r"/00099\.tar' cannot be fetched: FileNotFoundError") as failure:
        opened(f"{server}/00099.tar?key=secret", download=tmp_path / "d")
    assert "secret" not in str(failure.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_package_that_is_missing_is_named_before_any_work(
    scheme: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    config = DataConfig(path=f"{scheme}://bucket/{{000..127}}.tar", download=tmp_path)
    with pytest.raises(DataError, match=rf"{scheme}:// needs a package that is not installed: install {package}"):
        resolve_data(config)


def test_a_directory_for_what_is_fetched_has_to_be_named() -> None:
    with pytest.raises(DataError, match=r"data\.download: 'memory://b/x\.tar' is fetched before it is read; name a"):
        resolve_data(DataConfig(path="memory://user:secret@b/x.tar?key=secret"))


def test_commands_run_only_where_they_are_allowed(shards: Path, tmp_path: Path) -> None:
    path = f"pipe:cat {shards}/{{00003..00005}}.tar"
    with pytest.raises(DataError, match=r"allow it by data\.pipe=true"):
        resolve_data(DataConfig(path=path, download=tmp_path))
    data = opened(path, download=tmp_path / "d", pipe=True)
    assert data.captions() == ["caption 3", "caption 4", "caption 5"]


def test_a_command_that_fails_or_does_not_end_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ended with 3; it said: no such bucket"):
        opened("pipe:echo no such bucket >&2; exit 3", download=tmp_path, pipe=True)
    with pytest.raises(DataError, match=r"took more than 0\.2 s \(data\.fetch_timeout_s\)"):
        opened("pipe:sleep 60 | cat", download=tmp_path, pipe=True, fetch_timeout_s=0.2)
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.tar")]


def test_processes_that_fetch_at_once_fetch_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def write(sink: Any) -> None:
        calls.append(1)
        sink.write(b"content")

    targets = [tmp_path / "a" / "x.tar"]
    threads = [
        threading.Thread(target=fetch, args=([Remote("x", write)], targets), kwargs={"timeout_s": 10}) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert targets[0].read_bytes() == b"content"
    assert calls == [1]
