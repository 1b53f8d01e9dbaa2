"""Images as cameras and scanners make them: 16 bits, turned, transparent."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from ddil_dist.config import DataConfig
from ddil_dist.data.decoding import UnknownRangeError, decode_image
from ddil_dist.data.image_text import ImageTextData
from tests.data.support import encoded, write_rows


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def decoded(content: bytes, *, size: int, background: str = "white") -> torch.Tensor:
    return decode_image(content, size=size, background=background)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled_to_its_range(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256 * 256).round().astype(np.uint16).reshape(256, 256)
    image = decoded(save(Image.fromarray(ramp), kind), size=256)
    wanted = torch.linspace(-1, 1, 256 * 256).reshape(256, 256).expand(3, -1, -1)
    torch.testing.assert_close(image, wanted, atol=3e-5, rtol=0)
    smaller = decoded(save(Image.fromarray(ramp), kind), size=16)
    assert smaller.mean().item() == pytest.approx(0, abs=1e-3)
    assert smaller.abs().max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_range_that_no_file_tells_is_not_guessed(mode: str, tmp_path: Path) -> None:
    content = save(Image.new(mode, (8, 8), 3), "TIFF")
    with pytest.raises(UnknownRangeError):
        decoded(content, size=8)
    data = ImageTextData.open(
        write_rows(tmp_path / "d.parquet", [(encoded((1, 2, 3)), "a"), (content, "b")]), image_size=8
    )
    data.images([1])
    assert data.skipped == {"pixels of 32 bits, whose range is unknown": 1}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_is_turned_as_its_exif_says(orientation: int, kind: str) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16, 0], upright[:16, 16:, 1], upright[16:, :16, 2] = 255, 255, 255
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    stored = Image.fromarray(upright)
    if orientation in turn:
        stored = stored.transpose(Image.Transpose[turn[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = decoded(save(stored, kind, exif=exif, **options), size=32)
    corners = [[round(value) for value in image[:, y : y + 8, x : x + 8].mean((1, 2)).tolist()]
               for y, x in ((4, 4), (4, 20), (20, 4))]  # fmt: skip
    assert corners == [[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]


def test_exif_that_cannot_be_read_leaves_the_image_as_it_lies() -> None:
    image = decoded(save(Image.new("RGB", (8, 8), (255, 0, 0)), "PNG", exif=b"Exif\x00\x00MM\x00\x2anonsense"), size=8)
    assert image.mean((1, 2)).tolist() == [1, -1, -1]


def half_transparent(mode: str) -> Image.Image:
    """Black on the left; on the right red of alpha 0."""
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    image.paste((255, 0, 0, 0), (8, 0, 16, 16))
    if mode != "P":
        return image.convert(mode)
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(1, (8, 0, 16, 16))
    palette.info["transparency"] = 1
    return palette


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "color"), [("white", [1, 1, 1]), ("#0000ff", [-1, -1, 1])])
def test_what_is_transparent_shows_the_background(mode: str, background: str, color: list[int], tmp_path: Path) -> None:
    config = write_rows(tmp_path / "d.parquet", [(save(half_transparent(mode)), "a")])
    config = config.model_copy(update={"background": background})
    image = ImageTextData.open(config, image_size=16).images([0])[0][0]
    assert image[:, :, :8].mean((1, 2)).tolist() == [-1, -1, -1]
    assert image[:, :, 8:].mean((1, 2)).tolist() == color


def test_half_transparent_pixels_are_mixed_with_the_background() -> None:
    image = decoded(save(Image.new("RGBA", (8, 8), (0, 0, 0, 51))), size=8)
    assert image.mean().item() == pytest.approx(0.8 * 2 - 1, abs=0.01)


def test_white_is_the_background_where_none_is_chosen() -> None:
    assert DataConfig().background == "white"


def test_a_background_that_is_no_colour_is_refused() -> None:
    with pytest.raises(ValidationError, match="unknown color specifier: 'whitish'"):
        DataConfig(background="whitish")
