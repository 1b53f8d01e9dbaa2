"""Directories as people and tools lay data out: the files that are meant are read, the others are not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddil_dist.config import DataConfig
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.errors import DataError
from tests.data.support import encoded, write_rows

RED, GREEN = encoded((255, 0, 0)), encoded((0, 255, 0))
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345678\n"
)


def captions(path: Path, **settings: Any) -> list[str]:
    return ImageTextData.open(DataConfig(path=str(path), **settings), image_size=8).captions()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, [(RED, text) for text in texts])


def note_of_img2dataset(path: Path) -> None:
    pq.write_table(pa.table({"url": ["u"], "key": ["0"], "status": ["success"], "caption": ["c"]}), path)


def test_the_shards_that_img2dataset_wrote_are_read(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        members = {f"{shard}0000.jpg": RED, f"{shard}0000.txt": shard.encode(), f"{shard}0000.json": b"{}"}
        write_shard(tmp_path / f"{shard}.tar", members)
        note_of_img2dataset(tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text('{"count": 1}')
    assert captions(tmp_path) == ["00000", "00001"]


def test_the_folders_that_img2dataset_wrote_are_read(tmp_path: Path) -> None:
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "000000000.jpg").write_bytes(RED)
    (tmp_path / "00000" / "000000000.txt").write_text("a caption")
    note_of_img2dataset(tmp_path / "00000.parquet")
    assert captions(tmp_path) == ["a caption"]


def test_of_a_repository_the_parquet_files_of_the_split_are_read(tmp_path: Path) -> None:
    for split, texts in (("train", ["one", "two"]), ("test", ["three"])):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", *texts)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / ".git").mkdir()
    write_parquet(tmp_path / ".git" / "old.parquet", "old")
    assert captions(tmp_path) == ["one", "two"]
    assert captions(tmp_path, split="test") == ["three"]
    with pytest.raises(DataError, match=r"data\.split: .* no files of a split 'dev'; it has \['test', 'train'\]"):
        captions(tmp_path, split="dev")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("cc3m-train-0000.tar", "cc3m-validation-0000.tar"),
        ("train/0000.tar", "test/0000.tar"),
        ("data/train_001.tar", "data/test_001.tar"),
        ("0000.tar", "test.tar"),
    ],
)
def test_of_a_repository_of_shards_the_split_is_read(tmp_path: Path, train: str, test: str) -> None:
    for name in (train, test):
        write_shard(tmp_path / name, {"0.png": RED, "0.txt": name.encode()})
    (tmp_path / "README.md").write_text("# Shards")
    (tmp_path / "preview.png").write_bytes(GREEN)
    assert captions(tmp_path) == [train]


def test_of_a_repository_of_images_the_split_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "cats").mkdir(parents=True)
        (tmp_path / split / "cats" / "train_1.png").write_bytes(RED)
        (tmp_path / split / "metadata.jsonl").write_text(f'{{"file_name": "cats/train_1.png", "text": "{split}"}}\n')
    (tmp_path / "README.md").write_text("# Images")
    assert captions(tmp_path) == ["train"]
    assert captions(tmp_path, split="test") == ["test"]


def test_a_split_of_another_name_is_no_part_of_one_that_begins_like_it(tmp_path: Path) -> None:
    for split in ("train", "train_clean"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", split)
    assert captions(tmp_path) == ["train"]
    assert captions(tmp_path, split="train_clean") == ["train_clean"]


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "0.tar"])
def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(DataError, match=r"is a git-lfs pointer, not the file itself; fetch .* git lfs pull"):
        captions(tmp_path)


def test_a_tar_of_tars_says_what_is_in_it(tmp_path: Path) -> None:
    write_shard(tmp_path / "all.tar", {"00000.tar": b"x", "00001.tar": b"y", "notes.md": b"z"})
    with pytest.raises(DataError, match=r"has no rows: in its shards are 2 \.tar, 1 \.md; unpack the outer tar"):
        captions(tmp_path)


def test_what_is_no_data_is_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no data in it: no files; give Parquet"):
        captions(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.svg").write_text("<svg/>")
    (tmp_path / "LICENSE").write_text("mine")
    with pytest.raises(DataError, match=r"has no data in it: 3 \.svg, 1 without a suffix; give .* \.jpg"):
        captions(tmp_path)
