"""A policy's images on disk: streamed there as they are made, so that memory holds a batch and a restart goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddil_dist.errors import DataError
from ddil_dist.metrics.features import to_uint8

PROTOCOL_FILE = "protocol.json"
COST_FILE = "cost.json"


class SampleFolder:
    """Images by number, with the protocol that they were made by and what they cost.

    Invariant: an image is there whole or not at all, and all are of one protocol.
    """

    def __init__(self, path: Path, protocol: Mapping[str, Any]) -> None:
        """Begin in `path` or go on there. Raises DataError where images of another protocol are there."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        file = path / PROTOCOL_FILE
        wanted = json.loads(json.dumps(protocol))
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found != wanted:
                changed = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
                raise DataError(
                    f"{path}: holds images of another protocol ({', '.join(changed)} differ); give another --out, or "
                    "delete it"
                )
        else:
            _write(file, wanted)
        self._cost = {"images": 0, "seconds": 0.0, "rows": 0}
        if (path / COST_FILE).is_file():
            self._cost = json.loads((path / COST_FILE).read_text(encoding="utf-8"))

    def missing(self, num: int) -> list[int]:
        """The numbers under `num` of which there is no image yet."""
        return [index for index in range(num) if not self._file(index).is_file()]

    def add(self, indices: Sequence[int], images: Tensor, *, seconds: float, rows: int) -> None:
        """Keep `images` [B, 3, H, W] in [0, 1]; they cost so many seconds and rows of network calls."""
        for index, image in zip(indices, to_uint8(images), strict=True):
            partial = self._file(index).with_suffix(".partial")
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(partial, format="PNG")
            partial.replace(self._file(index))
        for key, value in (("images", len(indices)), ("seconds", seconds), ("rows", rows)):
            self._cost[key] += value
        _write(self.path / COST_FILE, self._cost)

    @property
    def num_images(self) -> int:
        """How many there are."""
        return len(list(self.path.glob("*.png")))

    @property
    def seconds_per_image(self) -> float:
        """Mean over all that were made."""
        return float(self._cost["seconds"] / max(1, self._cost["images"]))

    @property
    def nfes_per_image(self) -> float:
        """Rows of the denoiser's calls for one image."""
        return float(self._cost["rows"] / max(1, self._cost["images"]))

    def batches(self, num: int, size: int) -> Iterator[tuple[range, Tensor]]:
        """Images 0 to `num` - 1 in batches: their numbers, and float32 [B, 3, H, W] in [0, 1]."""
        for begin in range(0, num, size):
            numbers = range(begin, min(begin + size, num))
            yield numbers, torch.stack([_read(self._file(index)) for index in numbers])

    def _file(self, index: int) -> Path:
        return self.path / f"{index:06d}.png"


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path}: does not decode ({error}); delete it, and it is made again") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def _write(path: Path, plain: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
