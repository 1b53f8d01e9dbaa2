"""The same captioned images from every format that they may lie in; what is broken in each is skipped or named."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ddil_dist.config import DataConfig, load_config
from ddil_dist.data import hub
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.data.layout import find_layout
from ddil_dist.errors import DataError
from ddil_dist.launch.inline import run_inline
from tests.data.support import encoded, write_rows

ROWS = [(encoded((255, 0, 0)), "a red thing"), (encoded((0, 255, 0)), "ein grünes Ding"), (encoded((0, 0, 255)), "青")]
BROKEN = [(b"no image", "broken"), (encoded((9, 9, 9)), "  ")]
Rows = list[tuple[bytes, str]]


def parquet(directory: Path, rows: Rows) -> DataConfig:
    write_rows(directory / "d.parquet", rows)  # type: ignore[arg-type]
    return DataConfig(path=str(directory))


def arrow(directory: Path, rows: Rows) -> DataConfig:
    """As `datasets` saves to disk: streams of record batches, beside state.json."""
    for number, part in enumerate(part for part in (rows[:2], rows[2:]) if part):
        table = pa.table({"image": [{"bytes": image, "path": None} for image, _ in part], "text": [t for _, t in part]})
        with (
            pa.OSFile(str(directory / f"data-0000{number}-of-00002.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    (directory / "state.json").write_text("{}")
    return DataConfig(path=str(directory))


def shards(directory: Path, rows: Rows, *, captions: str = "txt") -> DataConfig:
    for number, part in enumerate((rows[:2], rows[2:])):
        with tarfile.open(directory / f"{number:05d}.tar", "w") as archive:
            for index, (image, text) in enumerate(part):
                caption = text if captions == "txt" else json.dumps({"width": 16, "caption": text})
                for suffix, content in (("png", image), (captions, caption.encode())):
                    member = tarfile.TarInfo(f"{number}{index:04d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return DataConfig(path=str(directory))


def folder(directory: Path, rows: Rows) -> DataConfig:
    for index, (image, text) in enumerate(rows):
        (directory / f"{index}.png").write_bytes(image)
        (directory / f"{index}.txt").write_text(text + "\n", encoding="utf-8")
    return DataConfig(path=str(directory))


def metadata(directory: Path, rows: Rows, *, suffix: str = "jsonl") -> DataConfig:
    (directory / "train").mkdir()
    lines = [{"file_name": f"{index}.png", "text": text} for index, (_, text) in enumerate(rows)]
    for line, (image, _) in zip(lines, rows, strict=True):
        (directory / "train" / line["file_name"]).write_bytes(image)
    with (directory / "train" / f"metadata.{suffix}").open("w", encoding="utf-8", newline="") as file:
        if suffix == "jsonl":
            file.writelines(json.dumps(line) + "\n" for line in lines)
        else:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(lines)
    return DataConfig(path=str(directory))


FORMATS: dict[str, tuple[str, Callable[[Path, Rows], DataConfig]]] = {
    "parquet": ("parquet", parquet),
    "arrow": ("arrow", arrow),
    "shards with text": ("webdataset", shards),
    "shards with json": ("webdataset", lambda directory, rows: shards(directory, rows, captions="json")),
    "folder": ("folder", folder),
    "folder with jsonl": ("folder", metadata),
    "folder with csv": ("folder", lambda directory, rows: metadata(directory, rows, suffix="csv")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_in_any_order(tmp_path: Path, name: str) -> None:
    kind, write = FORMATS[name]
    config = write(tmp_path, ROWS)
    assert find_layout(Path(config.path), config).kind == kind
    data = ImageTextData.open(config, image_size=8)
    assert len(data) == 3
    assert data.captions() == [text for _, text in ROWS]
    images, captions = data.images([2, 0, 1])
    assert captions == [ROWS[index][1] for index in (2, 0, 1)]
    colors = [[round(value) for value in image.mean((1, 2)).tolist()] for image in images]
    assert colors == [[-1, -1, 1], [1, -1, -1], [-1, 1, -1]]
    assert data.shuffled(np.random.default_rng(1)).tolist() == np.random.default_rng(1).permutation(3).tolist()
    named = ImageTextData.open(config.model_copy(update={"format": kind}), image_size=8)
    assert torch.equal(named.images([1])[0], data.images([1])[0])


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_broken_in_any_format_is_skipped_counted_and_told(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, write = FORMATS[name]
    data = ImageTextData.open(write(tmp_path, [*ROWS, *BROKEN]), image_size=8)
    assert data.images(range(5))[1] == [text for _, text in ROWS] + [ROWS[0][1]] * 2
    assert data.num_skipped == 2
    assert data.skipped == {"an image that does not decode": 1, "no caption": 1}
    assert data.name(3) in caplog.text
    assert data.name(3).startswith("row 3") or str(tmp_path) in data.name(3)
    assert "data: 1 of 5 rows skipped so far, " in caplog.text
    assert "the last: an image that does not decode" in caplog.text


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_usable_in_any_format_is_an_error_before_training(tmp_path: Path, name: str) -> None:
    _, write = FORMATS[name]
    with pytest.raises(DataError, match="none of the 2 rows has an image that decodes and a caption"):
        ImageTextData.open(write(tmp_path, BROKEN), image_size=8)


def test_images_without_a_caption_file_are_skipped(tmp_path: Path) -> None:
    folder(tmp_path, ROWS)
    (tmp_path / "1.txt").unlink()
    data = ImageTextData.open(DataConfig(path=str(tmp_path)), image_size=8)
    assert data.images([1])[1] == ["青"]
    assert data.num_skipped == 1


def test_a_metadata_file_without_its_column_is_named(tmp_path: Path) -> None:
    config = metadata(tmp_path, ROWS).model_copy(update={"text_column": "prompt"})
    with pytest.raises(DataError, match=r"line 1 of .*metadata\.jsonl has no 'prompt' .*\['file_name', 'text'\]"):
        ImageTextData.open(config, image_size=8)


def test_a_metadata_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    metadata(tmp_path, ROWS)
    (tmp_path / "train" / "metadata.jsonl").write_text("{half")
    with pytest.raises(DataError, match=r"metadata\.jsonl cannot be read"):
        ImageTextData.open(DataConfig(path=str(tmp_path)), image_size=8)


@pytest.mark.parametrize("damage", [lambda data: data[:560], lambda data: b"x" * 2000])
def test_a_damaged_or_compressed_shard_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    shards(tmp_path, ROWS)
    file = tmp_path / "00001.tar"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"00001\.tar' is not a plain tar file"):
        ImageTextData.open(DataConfig(path=str(tmp_path)), image_size=8)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        arrow(tmp_path / split, ROWS)
    assert len(ImageTextData.open(DataConfig(path=str(tmp_path), split="test"), image_size=8)) == 3
    with pytest.raises(DataError, match=r"data\.split: .* 'dev'; it has \['test', 'train'\]"):
        ImageTextData.open(DataConfig(path=str(tmp_path), split="dev"), image_size=8)


def test_a_hub_id_is_fetched_as_parquet_of_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        home = tmp_path / str(options["revision"])
        (home / "default" / "train").mkdir(parents=True, exist_ok=True)
        write_rows(home / "test-00000-of-00001.parquet", [(ROWS[0][0], "fetched earlier")])
        if options["revision"] is not None:
            write_rows(home / "default" / "train" / "0000.parquet", [*ROWS[:2]])
            write_rows(home / "default" / "train" / "0001.parquet", [*ROWS[2:]])
        return str(home)

    monkeypatch.setattr(hub, "CONVERTED", "converted")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    data = ImageTextData.open(DataConfig(path="owner/things"), image_size=8)
    assert data.captions() == [text for _, text in ROWS]
    assert [(call["name"], call["repo_type"], call["revision"]) for call in asked] == [
        ("owner/things", "dataset", None),
        ("owner/things", "dataset", "converted"),
    ]
    assert "train-*.parquet" in asked[0]["allow_patterns"]
    assert ImageTextData.open(DataConfig(path="owner/things", split="test"), image_size=8).captions() == [
        "fetched earlier"
    ]
    with pytest.raises(DataError, match="no data set with Parquet files of a split 'dev'"):
        ImageTextData.open(DataConfig(path="owner/things", split="dev"), image_size=8)


def test_a_run_on_prompts_alone_needs_no_data(tiny_overrides: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue circle\n")
    config = load_config(
        None,
        [
            *(item for item in tiny_overrides if not item.startswith("data.path")),
            "data.path=/nowhere",
            f"data.prompts={prompts}",
            "prior.parts=[{until: 1.0, forward: 0.0, student: 0.4, teacher: 0.6}]",
        ],
    )
    for labels in ("actors", "learner"):
        made = config.model_copy(
            update={
                "rollout": config.rollout.model_copy(update={"labels": labels}),
                "run": config.run.model_copy(update={"name": labels}),
            }
        )
        assert not made.needs_data
        assert run_inline(made)
        lines = [json.loads(line) for line in (made.run.path / "metrics.jsonl").read_text().splitlines()]
        sources = {name for line in lines if line["kind"] == "update" for name in line["sources"]}
        assert sources <= {"STUDENT", "TEACHER", "NOISE"}


@pytest.mark.parametrize(("image", "text"), [("jpg", "caption"), ("image", "txt"), ("png", "text"), ("img", "prompt")])
def test_columns_of_usual_names_are_taken_and_told(
    tmp_path: Path, image: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = pa.table({"id": [1], image: [ROWS[0][0]], text: ["a red thing"]})
    pq.write_table(table, tmp_path / "d.parquet")
    data = ImageTextData.open(DataConfig(path=str(tmp_path)), image_size=8)
    assert data.images([0])[1] == ["a red thing"]
    assert (f"has no column 'image'; {image!r} is taken" in caplog.text) == (image != "image")
    assert (f"has no column 'text'; {text!r} is taken" in caplog.text) == (text != "text")


def test_where_several_columns_fit_one_has_to_be_named(tmp_path: Path) -> None:
    table = pa.table({"image": [ROWS[0][0]], "caption": ["long"], "prompt": ["short"]})
    pq.write_table(table, tmp_path / "d.parquet")
    config = DataConfig(path=str(tmp_path))
    with pytest.raises(
        DataError,
        match=r"no column 'text' \(data\.text_column, and 'caption' and 'prompt' would do: name one\); its columns are",
    ):
        ImageTextData.open(config, image_size=8)
    chosen = config.model_copy(update={"text_column": "prompt"})
    assert ImageTextData.open(chosen, image_size=8).captions() == ["short"]


def test_a_column_that_was_named_has_no_stand_in(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [ROWS[0][0]], "caption": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(
        DataError, match=r"no column 'words' \(data\.text_column\); its columns are \['image', 'caption'\]"
    ):
        ImageTextData.open(DataConfig(path=str(tmp_path), text_column="words"), image_size=8)


def test_a_metadata_files_caption_may_have_a_usual_name(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(ROWS[0][0])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "a red thing"}\n')
    assert ImageTextData.open(DataConfig(path=str(tmp_path)), image_size=8).captions() == ["a red thing"]
