"""Encoded images to tensors: upright, opaque, of 8 or 16 bits, their middle square resized, scaled to [-1, 1]."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What images may be in; the decoder's others include such that run a program, as EPS does."""

SIXTEEN_BITS = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


class UnknownRangeError(ValueError):
    """Pixels are numbers of 32 bits, and the file does not say which of them is white."""


def decode_image(encoded: bytes, *, size: int, background: str) -> Tensor:
    """An image [3, size, size] float32 in [-1, 1].

    What EXIF says of its orientation is followed. Transparency lies over `background`, a colour by name or as #rrggbb.
    Grey of 16 bits is scaled to its range. Raises UnknownRangeError, and whatever a decoder raises at damaged bytes.
    """
    image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    kind = image.format
    with suppress(Exception):  # unreadable EXIF raises anything; the image may be good all the same
        image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and kind == "PNG"):
        grey = Image.fromarray(np.asarray(image, dtype=np.float32) * np.float32(255 / 65535))
        pixels = np.asarray(_middle(grey, size), dtype=np.float32).clip(0, 255)
        return _scaled(np.repeat(pixels[:, :, None], 3, axis=2))
    if image.mode in ("I", "F"):
        raise UnknownRangeError
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return _scaled(np.asarray(_middle(image.convert("RGB"), size), dtype=np.float32))


def _middle(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # The square alone: all of a long strip, enlarged by its short side, may be of gigabytes.
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _scaled(pixels: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    """[H, W, 3] in [0, 255] to [3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)
