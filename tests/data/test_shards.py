"""Shards: however many there are, none stays open, and threads may read them."""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddil_dist.config import DataConfig
from ddil_dist.data.samples import open_samples

SHARDS, ROWS = 40, 5


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for shard in range(SHARDS):
        with tarfile.open(tmp_path / f"{shard:03d}.tar", "w") as archive:
            for row in range(ROWS):
                for suffix in ("png", "txt"):
                    content = f"{suffix} of row {shard * ROWS + row}".encode()
                    member = tarfile.TarInfo(f"{row}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return tmp_path


def num_open() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_shard_stays_open(directory: Path) -> None:
    samples = open_samples(DataConfig(path=str(directory)))
    before = num_open()
    for row in range(len(samples)):
        assert samples.image(row) == f"png of row {row}".encode()
        assert samples.caption(row) == f"txt of row {row}"
    assert num_open() < before + SHARDS / 2


def test_threads_read_shards(directory: Path) -> None:
    samples = open_samples(DataConfig(path=str(directory)))
    rows = [*range(SHARDS * ROWS)] * 5
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(samples.image, rows)) == [f"png of row {row}".encode() for row in rows]
