"""The data's latents and encoded captions, as `python -m ddil_dist.cache` has made them once.

A run with `data.cache=DIR` then encodes neither images nor captions as it trains. Of every row the posterior's mean and
deviation are kept, not a draw of it: each epoch still draws its own. Arrays lie in plain files that are mapped, not
read, so a cache may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddil_dist.config import RunConfig
from ddil_dist.errors import ConfigError
from ddil_dist.models.conditioning import Conditioning

if TYPE_CHECKING:
    from ddil_dist.models.pipeline import TeacherPipeline

MANIFEST = "cache.json"
PARTS = ("embeddings", "pooled", "size_ids")
"""The fields of `Conditioning`, a file each."""


class LatentCache:
    """A cache on disk. mean, std: [N, C, h, w] float32, of the data's rows; captions: N texts.

    skipped: numbers of rows that were found unusable as it was made, by what is wrong with them.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        self.made_from: dict[str, Any] = manifest["made_from"]
        self.captions: list[str] = manifest["captions"]
        self.skipped: dict[str, int] = manifest["skipped"]
        self._device = device
        self._mean, self._std = _mapped(directory / "mean.npy"), _mapped(directory / "std.npy")
        self._index = {caption: row for row, caption in enumerate(dict.fromkeys(["", *self.captions]))}
        self._parts = [_mapped(path) for name in PARTS if (path := directory / f"{name}.npy").is_file()]
        self._dtype: torch.dtype = getattr(torch, manifest["dtype"])

    @classmethod
    def open(cls, config: RunConfig, teacher: TeacherPipeline) -> LatentCache:
        """The run's cache; raises ConfigError if it is not whole, or of other encoders or other data."""
        directory = config.data.cache
        assert directory is not None
        try:
            cache = cls(directory, teacher.device)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"data.cache: {directory} is no whole cache ({error}); make it with "
                f"python -m ddil_dist.cache --output {directory}"
            ) from error
        wanted = identity(config, teacher)
        for key, value in wanted.items():
            if cache.made_from.get(key) != value:
                raise ConfigError(
                    f"data.cache: {directory} was made with {key}={cache.made_from.get(key)!r}, the run has {value!r}; "
                    "make another, or set data.cache=null"
                )
        return cache

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """Mean and deviation, both [B, C, h, w] float32 on the device, and captions of some rows."""
        index = np.asarray(rows)
        mean, std = (torch.from_numpy(array[index]).to(self._device) for array in (self._mean, self._std))
        return mean, std, [self.captions[row] for row in rows]

    def __contains__(self, caption: object) -> bool:
        return caption in self._index

    def __getitem__(self, caption: str) -> Conditioning:
        """A caption's encoding, one row."""
        row = self._index[caption]
        tensors = (torch.from_numpy(part[row : row + 1].copy()) for part in self._parts)
        return Conditioning(*(tensor.to(self._device, self._dtype) for tensor in tensors))


def identity(config: RunConfig, teacher: TeacherPipeline) -> dict[str, Any]:
    """What a cache depends on: which encoders, not where they lie. So it serves every stage of a curriculum."""
    data = config.data
    return {
        "teacher.precision": config.teacher.precision,
        "the encoders of teacher.pipeline": teacher.encoders_digest(),
        "image size": teacher.image_size,
        "data.path": data.path,
        "data.split": data.split,
        "data.image_column": data.image_column,
        "data.text_column": data.text_column,
        "data.background": data.background,
    }


def _mapped(path: Path) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
