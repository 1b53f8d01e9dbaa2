"""The data's latents and encoded captions, made once: `python -m ddil_dist.data.cache --output DIR [key=value ...]`.

A run with `data.cache=DIR` then encodes neither images nor captions as it trains. Of every row the posterior's mean and
deviation are kept, not a draw of it: each epoch still draws its own. Arrays lie in plain files that are mapped, not
read, so a cache may be larger than memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddil_dist.config import RunConfig, load_config
from ddil_dist.data.skipped import by_reason
from ddil_dist.errors import ConfigError, DataError, DdilError
from ddil_dist.models.conditioning import Conditioning

if TYPE_CHECKING:
    from ddil_dist.models.pipeline import TeacherPipeline
    from ddil_dist.problem import ImitationProblem

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
                f"python -m ddil_dist.data.cache --output {directory}"
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


def make_cache(problem: ImitationProblem, output: Path, *, batch_size: int, overwrite: bool = False) -> None:
    """Encode all of the data's rows into `output`, with a progress bar.

    A skipped row is that of the next usable one, as it is where nothing is cached. The manifest is written last: what
    was interrupted is no cache. DataError if `output` has other files, or a whole cache without `overwrite`.
    """
    from tqdm import tqdm

    if output.exists() and any(output.iterdir()) and not (output / "mean.npy").is_file():
        raise DataError(f"--output: {output} has other files in it; give an empty directory, or a cache to make anew")
    if (output / MANIFEST).exists() and not overwrite:
        raise DataError(f"--output: {output} is a cache already; give another directory, or --overwrite to replace it")
    data = problem.open_data()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    shape = (len(data), *problem.teacher.latent_shape)
    mean, std = (_new(output / f"{name}.npy", shape, np.float32) for name in ("mean", "std"))
    captions: list[str] = []
    with tqdm(total=len(data), desc="images", unit="image", mininterval=1) as bar:
        for first in range(0, len(data), batch_size):
            images, texts = data.images(range(first, min(first + batch_size, len(data))))
            found = problem.teacher.image_posterior(images)
            last = first + len(images)
            mean[first:last], std[first:last] = (part.cpu().numpy() for part in found)
            captions += texts
            bar.update(len(images))
    dtype = _encode_captions(problem, list(dict.fromkeys(["", *captions])), output, batch_size=batch_size)
    manifest = {
        "made_from": identity(problem.config, problem.teacher),
        "captions": captions,
        "skipped": data.skipped,
        "dtype": dtype,
    }
    staged = output / f"{MANIFEST}.partial"
    staged.write_text(json.dumps(manifest), encoding="utf-8")
    staged.replace(output / MANIFEST)


def _encode_captions(problem: ImitationProblem, captions: list[str], output: Path, *, batch_size: int) -> str:
    """Write the encodings of distinct captions, float32 whatever the dtype that they are of, which is returned."""
    from tqdm import tqdm

    files: list[Any] = []
    dtype = ""
    with tqdm(total=len(captions), desc="captions", unit="caption", mininterval=1) as bar:
        for first in range(0, len(captions), batch_size):
            encoded = problem.encoder.encode(captions[first : first + batch_size])
            parts = [part for name in PARTS if (part := getattr(encoded, name, None)) is not None]
            if not files:
                dtype = str(parts[0].dtype).removeprefix("torch.")
                shapes = [(len(captions), *part.shape[1:]) for part in parts]
                files = [
                    _new(output / f"{name}.npy", shape, np.float32) for name, shape in zip(PARTS, shapes, strict=False)
                ]
            for file, part in zip(files, parts, strict=True):
                file[first : first + len(part)] = part.float().cpu().numpy()
            bar.update(len(encoded))
    return dtype


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


def _new(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a cache; 0, or 2 where the configuration or the data cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        from ddil_dist.launch.prepare import settle_paths

        config = settle_paths(load_config(options.config, [*options.overrides, "data.cache=null"]))
        from ddil_dist.problem import ImitationProblem, default_device

        problem = ImitationProblem.create(config, default_device())
        make_cache(problem, options.output, batch_size=options.batch_size, overwrite=options.overwrite)
    except DdilError as error:
        print(f"ddil_dist: {error}", file=sys.stderr)
        return 2
    made = LatentCache(options.output, problem.device)
    told = f", {sum(made.skipped.values())} skipped: {by_reason(made.skipped)}" if made.skipped else ", none skipped"
    print(f"{options.output}: {len(made.captions)} rows{told}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ddil_dist.data.cache", description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the run; see deploy/runs/")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images encoded at once (32)")
    parser.add_argument("--overwrite", action="store_true", help="replace the cache that DIR is")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=/data/shards")
    return parser


if __name__ == "__main__":
    sys.exit(main())
