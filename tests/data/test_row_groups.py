"""Parquet larger than what is kept of it: the right rows, each row group read about once, a bound that holds."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddil_dist.config import DataConfig
from ddil_dist.data import row_groups
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.data.row_groups import RowGroups
from ddil_dist.data.samples import Samples, open_samples
from ddil_dist.errors import DataError
from tests.data.support import encoded

FILES = ((37, 10), (50, 7), (0, 10), (8, 100), (61, 10))
"""Rows of each file, and of a row group in it."""
NUM = sum(rows for rows, _ in FILES)
GROUPS = sum(-(-rows // group) for rows, group in FILES)
IMAGE_BYTES = 10_000


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("groups")
    rng = np.random.default_rng(0)
    for number, (rows, group) in enumerate(FILES):
        images = [{"bytes": rng.bytes(IMAGE_BYTES), "path": None} for _ in range(rows)]
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        captions = pa.array([f"{number}/{row}" for row in range(rows)], pa.string())
        table = pa.table({"image": pa.array(images, struct), "text": captions, "other": [rng.bytes(5000)] * rows})
        pq.write_table(table, path / f"{number}.parquet", row_group_size=group)
    return path


@pytest.fixture
def whole(directory: Path) -> list[tuple[bytes, str]]:
    """Every row, as Arrow reads the files at once."""
    table = pa.concat_tables(pq.read_table(file, columns=["image", "text"]) for file in sorted(directory.iterdir()))
    return [(row["image"]["bytes"], row["text"]) for row in table.to_pylist()]


@pytest.fixture
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A bound that is a fifth of the data, or what the test is parametrized with."""
    bound: int = getattr(request, "param", NUM * IMAGE_BYTES // 5)
    monkeypatch.setattr(row_groups, "CACHE_BYTES", bound)
    return bound


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that were read, in order."""
    read, found = RowGroups._read, []

    def noted(groups: RowGroups, group: int) -> Any:
        found.append(group)
        return read(groups, group)

    monkeypatch.setattr(RowGroups, "_read", noted)
    return found


def opened(directory: Path) -> Samples:
    return open_samples(DataConfig(path=str(directory)))


def order(samples: Samples, seed: int) -> list[int]:
    rows: list[int] = samples.shuffled(np.random.default_rng(seed)).tolist()
    return rows


@pytest.mark.parametrize("kept", [1, 250_000, 2**30], indirect=True)
def test_rows_are_those_of_the_files_in_any_order(directory: Path, whole: list[tuple[bytes, str]], kept: int) -> None:
    samples = opened(directory)
    assert len(samples) == NUM
    rows = [*range(NUM), *reversed(range(NUM)), *np.random.default_rng(1).permutation(NUM).tolist()]
    assert [(samples.image(row), samples.caption(row)) for row in rows] == [whole[row] for row in rows]


@pytest.mark.parametrize("kept", [1, 250_000, NUM * IMAGE_BYTES // 5], indirect=True)
def test_an_epoch_has_every_row_once_and_reads_every_group_once(directory: Path, reads: list[int], kept: int) -> None:
    samples = opened(directory)
    order(samples, 9)  # looks into a group, for how large they are in memory
    for seed in range(3):
        reads.clear()
        rows = order(samples, seed)
        assert sorted(rows) == list(range(NUM))
        for row in rows:
            samples.image(row)
        groups = Counter(reads)
        assert max(groups.values()) == 1
        assert GROUPS - 2 <= len(groups) <= GROUPS, "some may be kept of the epoch before"


def test_two_streams_of_a_process_read_every_group_once_each(directory: Path, reads: list[int], kept: int) -> None:
    samples = opened(directory)
    for ours, theirs in zip(order(samples, 1), order(samples, 2), strict=True):
        samples.image(ours)
        samples.image(theirs)
    assert GROUPS <= len(reads) <= 2.2 * GROUPS


@pytest.mark.parametrize("kept", [15 * IMAGE_BYTES], indirect=True)
def test_two_streams_have_a_group_each_however_large(directory: Path, reads: list[int], kept: int) -> None:
    samples = opened(directory)
    rows, others = order(samples, 1), order(samples, 2)
    for first in range(0, NUM, 4):
        for stream in (rows, others):
            for row in stream[first : first + 4]:
                samples.image(row)
    assert len(reads) <= 3.1 * GROUPS, "once for each stream, and at most once more where a stream goes to its next"


def test_images_that_repeat_count_as_often_as_they_are_read(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images = [{"bytes": image} for _ in range(20) for image in [rng.bytes(IMAGE_BYTES)] * 4]
    table = pa.table({"image": images, "text": ["a caption"] * len(images)})
    pq.write_table(table, tmp_path / "repeats.parquet", row_group_size=10)
    monkeypatch.setattr(row_groups, "CACHE_BYTES", len(images) * IMAGE_BYTES // 2)  # twice what the file says
    samples = opened(tmp_path)
    for row in order(samples, 1):
        samples.image(row)
    assert len(reads) <= 8 + 1


@pytest.mark.parametrize("kept", [NUM * IMAGE_BYTES * 2 // 3], indirect=True)
def test_an_order_is_its_seeds_and_mixes_groups(directory: Path, kept: int) -> None:
    samples = opened(directory)
    assert order(samples, 1) == order(opened(directory), 1)
    assert order(samples, 1) != order(samples, 2)
    firsts = [order(samples, seed)[:10] for seed in range(200)]
    assert {row for rows in firsts for row in rows} == set(range(NUM)), "an epoch may begin with any row"
    gaps = np.abs(np.diff(firsts, axis=1))
    assert (gaps >= 10).mean() > 0.4, "neighbours are often of different groups"
    assert (gaps == 1).mean() < 0.1, "and seldom in the order of the file"


def test_data_that_fits_is_shuffled_as_a_whole_and_read_once(directory: Path, reads: list[int]) -> None:
    samples = opened(directory)
    assert order(samples, 5) == np.random.default_rng(5).permutation(NUM).tolist()
    for row in [*order(samples, 5), *order(samples, 6)]:
        samples.image(row)
    assert len(reads) == len(set(reads)) == GROUPS


@pytest.mark.parametrize("kept", [1, 250_000, 500_000], indirect=True)
def test_what_is_kept_is_bounded(directory: Path, kept: int) -> None:
    samples = opened(directory)
    largest = 1.1 * 10 * IMAGE_BYTES
    before, most = pa.total_allocated_bytes(), 0
    for row in np.random.default_rng(0).permutation(NUM).tolist():
        samples.image(row)
        most = max(most, pa.total_allocated_bytes() - before)
    in_flight = 2 * largest  # Arrow's threads may let go of what they read a moment after it was handed over
    assert IMAGE_BYTES < most <= max(kept, 2 * largest) + in_flight < 0.6 * NUM * IMAGE_BYTES


def test_opening_reads_no_images(directory: Path, reads: list[int]) -> None:
    before = pa.total_allocated_bytes()
    samples = opened(directory)
    assert [samples.caption(row) for row in (0, NUM - 1)] == ["0/0", "4/60"]
    assert pa.total_allocated_bytes() - before < 20 * IMAGE_BYTES < NUM * IMAGE_BYTES / 2
    assert reads == []


def test_threads_share_what_is_kept(directory: Path, whole: list[tuple[bytes, str]], kept: int) -> None:
    samples = opened(directory)

    def right(seed: int) -> bool:
        return all(samples.image(row) == whole[row][0] for row in order(samples, seed))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(8)))
    groups = samples._images  # type: ignore[attr-defined]
    assert groups._kept_bytes == sum(cells.get_total_buffer_size() for cells in groups._kept.values()) <= kept


def test_a_group_that_went_missing_is_named(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    samples = opened(tmp_path)
    (tmp_path / "1.parquet").unlink()
    assert samples.image(0) is not None
    with pytest.raises(OSError, match=r"data\.path: row group 1 of .*1\.parquet cannot be reached: .*No such file"):
        samples.image(37 + 8)


def test_a_damaged_group_says_which_and_what_to_do(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    path.write_bytes((directory / "0.parquet").read_bytes())
    begin = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[begin : begin + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    samples = opened(path)
    assert samples.image(5) is not None
    with pytest.raises(DataError, match=r"row group 2 of .*d\.parquet is damaged: .*; fetch the file again"):
        samples.image(25)


def test_broken_rows_give_way_to_the_next_groups_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "CACHE_BYTES", 1)
    images = [encoded((20 * row, 0, 0)) for row in range(12)]
    for row in (2, 3, 11):
        images[row] = b"broken"
    pq.write_table(pa.table({"image": images, "text": [str(row) for row in range(12)]}), tmp_path / "d.parquet",
                   row_group_size=3)  # fmt: skip
    data = ImageTextData.open(DataConfig(path=str(tmp_path)), image_size=8)
    assert data.images(range(12))[1] == ["0", "1", "4", "4", "4", "5", "6", "7", "8", "9", "10", "0"]
    assert data.num_skipped == 3
