"""Captioned images from Parquet: what is decoded, what is skipped and counted, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddil_dist.config import DataConfig
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.errors import DataError
from tests.data.support import encoded, write_rows

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
CAPTIONS = [
    "a cat",
    "Straße, naïve café",
    "一只红色的猫",
    "قطة حمراء",
    "красная кошка",
    "🐈‍⬛ <b>&amp;</b>",
    "ก่\u0301\u2028x",
]


def color_of(image: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in image.mean(dim=(1, 2)).tolist()]


def test_images_are_scaled_to_minus_1_and_1_in_rgb_order(tmp_path: Path) -> None:
    config = write_rows(tmp_path / "d.parquet", [(encoded((255, 0, 51)), "a")])
    images, captions = ImageTextData.open(config, image_size=16).images([0])
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.float32
    assert color_of(images[0]) == [1.0, -1.0, pytest.approx(51 / 127.5 - 1, abs=1e-3)]
    assert captions == ["a"]


def test_captions_of_any_script_arrive_unchanged(tmp_path: Path) -> None:
    config = write_rows(tmp_path / "d.parquet", [(encoded(RED), caption) for caption in CAPTIONS])
    data = ImageTextData.open(config, image_size=8)
    assert data.captions() == CAPTIONS
    assert data.images(range(len(CAPTIONS)))[1] == CAPTIONS


@pytest.mark.parametrize(("width", "height"), [(32, 16), (16, 32), (8, 40), (100, 99), (5, 3), (1, 1), (7, 1000)])
def test_any_shape_is_resized_by_its_short_side_and_cropped_in_the_middle(
    tmp_path: Path, width: int, height: int
) -> None:
    # A third of the long side in red, then green, then blue: the middle of the picture is green.
    picture = Image.new("RGB", (width, height), GREEN)
    long = max(width, height)
    third = long // 3
    if third > 1:
        box_a = (0, 0, third - 1, height) if width > height else (0, 0, width, third - 1)
        box_b = (width - third + 1, 0, width, height) if width > height else (0, height - third + 1, width, height)
        if min(width, height) * 3 <= long:  # the crop lies within the middle third
            picture.paste(RED, box_a)
            picture.paste(BLUE, box_b)
    file = tmp_path / "p.png"
    picture.save(file)
    config = write_rows(tmp_path / "d.parquet", [(file.read_bytes(), "a")])
    images, _ = ImageTextData.open(config, image_size=16).images([0])
    assert images.shape == (1, 3, 16, 16)
    middle = images[0, :, 6:10, 6:10]
    assert color_of(middle) == [-1.0, 1.0, -1.0]


def test_a_crop_keeps_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255
    file = tmp_path / "p.png"
    Image.fromarray(pixels).save(file)
    config = write_rows(tmp_path / "d.parquet", [(file.read_bytes(), "a")])
    images, _ = ImageTextData.open(config, image_size=4).images([0])
    assert torch.equal(images[0], torch.ones(3, 4, 4))


def test_of_a_long_strip_only_the_middle_is_enlarged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strip = Image.new("RGB", (1501, 1), RED)
    strip.paste(GREEN, (740, 0, 761, 1))
    file = tmp_path / "p.png"
    strip.save(file)
    resize, made = Image.Image.resize, []

    def noted(image: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        made.append(tuple(size))
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    config = write_rows(tmp_path / "d.parquet", [(file.read_bytes(), "a")])
    images, _ = ImageTextData.open(config, image_size=16).images([0])
    assert set(made) == {(16, 16)}
    assert color_of(images[0]) == [-1.0, 1.0, -1.0]


@pytest.mark.parametrize("kind", ["EPS", "PCX"])
def test_formats_that_data_sets_do_not_have_are_not_handed_to_their_decoders(tmp_path: Path, kind: str) -> None:
    config = write_rows(tmp_path / "d.parquet", [(encoded(RED), "a"), (encoded(RED, kind=kind), "b")])
    data = ImageTextData.open(config, image_size=16)
    assert data.images([1])[1] == ["a"]
    assert data.num_skipped == 1


@pytest.mark.parametrize("step", ["convert", "resize"])
def test_a_decoder_may_raise_anything(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_rows(tmp_path / "d.parquet", [(encoded(RED), "a"), (encoded(BLUE, (8, 9)), "b")])
    data = ImageTextData.open(config, image_size=16)
    original = getattr(Image.Image, step)

    def broken(image: Image.Image, *arguments: Any, **options: Any) -> Any:
        if image.size == (8, 9):
            raise ZeroDivisionError
        return original(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, step, broken)
    assert data.images([1])[1] == ["a"]
    assert data.num_skipped == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_common_formats_decode(tmp_path: Path, kind: str) -> None:
    config = write_rows(tmp_path / "d.parquet", [(encoded(BLUE, kind=kind), "a")])
    images, _ = ImageTextData.open(config, image_size=16).images([0])
    np.testing.assert_allclose(color_of(images[0]), [-1, -1, 1], atol=0.05)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "p.tiff"
    Image.new(mode, (16, 16)).save(file)
    config = write_rows(tmp_path / "d.parquet", [(file.read_bytes(), "a")])
    assert ImageTextData.open(config, image_size=8).images([0])[0].shape == (1, 3, 8, 8)


def test_unusable_rows_give_way_to_the_next_and_are_counted(tmp_path: Path) -> None:
    red, green, blue = (encoded(color) for color in (RED, GREEN, BLUE))
    config = write_rows(
        tmp_path / "d.parquet",
        [(red, "red"), (b"not an image", "x"), (None, "x"), (green, "green"), (blue, "  "), (blue[:40], "x"),
         (blue, None), (b"", "x")],
    )  # fmt: skip
    data = ImageTextData.open(config, image_size=8)
    assert len(data) == 8
    assert data.num_skipped == 0
    assert data.images([1, 2, 3, 0])[1] == ["green", "green", "green", "red"]
    assert data.num_skipped == 2
    assert data.images([7, 6, 5, 4])[1] == ["red"] * 4
    assert data.num_skipped == 6
    assert data.images([1])[1] == ["green"]
    assert data.num_skipped == 6, "a row is counted once"
    assert data.captions() == ["red", "x", "x", "green", "x", "x"]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=6),
    keep=st.floats(0.2, 1),
)
def test_a_damaged_image_is_used_or_skipped_but_never_raises(
    tmp_path_factory: pytest.TempPathFactory, kind: str, cuts: list[tuple[float, int]], keep: float
) -> None:
    good = encoded(RED)
    damaged = bytearray(encoded(BLUE, kind=kind))
    for where, mask in cuts:
        damaged[int(where * (len(damaged) - 1))] ^= mask
    path = tmp_path_factory.mktemp("damaged") / "d.parquet"
    config = write_rows(path, [(good, "good"), (bytes(damaged[: int(keep * len(damaged))]), "damaged")])
    data = ImageTextData.open(config, image_size=8)
    images, captions = data.images([1])
    assert captions == (["good"] if data.num_skipped else ["damaged"])
    assert torch.isfinite(images).all()


def test_nothing_usable_is_a_data_error(tmp_path: Path) -> None:
    config = write_rows(tmp_path / "d.parquet", [(b"junk", "a"), (encoded(RED), "")])
    with pytest.raises(DataError, match="none of the 2 rows has an image that decodes and a caption"):
        ImageTextData.open(config, image_size=8)


def test_no_rows_is_a_data_error(tmp_path: Path) -> None:
    config = write_rows(tmp_path / "d.parquet", [])
    with pytest.raises(DataError, match="has no rows"):
        ImageTextData.open(config, image_size=8)


def test_a_missing_path_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.path: no file or directory at '/nowhere/d\.parquet'"):
        ImageTextData.open(DataConfig(path="/nowhere/d.parquet"), image_size=8)


@pytest.mark.parametrize("column", ["image_column", "text_column"])
def test_a_missing_column_is_named_with_the_key_to_set(tmp_path: Path, column: str) -> None:
    config = write_rows(tmp_path / "d.parquet", [(encoded(RED), "a")])
    with pytest.raises(
        DataError, match=rf"no column 'caption_en' \(data\.{column}\); its columns are \['image', 'text'\]"
    ):
        ImageTextData.open(config.model_copy(update={column: "caption_en"}), image_size=8)


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    path.write_text("image,text\n")
    with pytest.raises(DataError, match=r"d\.parquet' is not readable as Parquet"):
        ImageTextData.open(DataConfig(path=str(path)), image_size=8)


def test_an_empty_directory_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path"):
        ImageTextData.open(DataConfig(path=str(tmp_path)), image_size=8)


def test_a_directory_of_files_is_one_data_set_and_bare_bytes_do(tmp_path: Path) -> None:
    for name, color in (("a", RED), ("b", BLUE)):
        table = pa.table({"jpg": [encoded(color)], "caption": [name]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    config = DataConfig(path=str(tmp_path), image_column="jpg", text_column="caption")
    images, captions = ImageTextData.open(config, image_size=8).images([0, 1])
    assert captions == ["a", "b"]
    assert [color_of(image) for image in images] == [[1, -1, -1], [-1, -1, 1]]


def test_columns_of_another_type_are_unusable_not_a_crash(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "text": [["one", "two"]], "number": [3]}), tmp_path / "d.parquet")
    for image, text in (("image", "text"), ("number", "image"), ("image", "image")):
        config = DataConfig(path=str(tmp_path / "d.parquet"), image_column=image, text_column=text)
        with pytest.raises(DataError, match="none of the 1 rows"):
            ImageTextData.open(config, image_size=8)
