"""Encode the data's images and captions once and for all: `python -m ddil_dist.cache --output DIR [key=value ...]`.

What it makes is read by `ddil_dist.data.cache`, in runs with `data.cache=DIR`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_dist.config import load_config
from ddil_dist.errors import DataError, DdilError

if TYPE_CHECKING:
    from ddil_dist.problem import ImitationProblem


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
    from ddil_dist.data.cache import LatentCache
    from ddil_dist.data.skipped import by_reason

    made = LatentCache(options.output, problem.device)
    told = f", {sum(made.skipped.values())} skipped: {by_reason(made.skipped)}" if made.skipped else ", none skipped"
    print(f"{options.output}: {len(made.captions)} rows{told}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ddil_dist.cache", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the run; see deploy/runs/")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images encoded at once (32)")
    parser.add_argument("--overwrite", action="store_true", help="replace the cache that DIR is")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=/data/shards")
    return parser


def make_cache(problem: ImitationProblem, output: Path, *, batch_size: int, overwrite: bool = False) -> None:
    """Encode all of the data's rows into `output`, with a progress bar.

    A skipped row is that of the next usable one, as it is where nothing is cached. The manifest is written last: what
    was interrupted is no cache. DataError if `output` has other files, or a whole cache without `overwrite`.
    """
    import numpy as np
    from tqdm import tqdm

    from ddil_dist.data.cache import MANIFEST, identity

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
    import numpy as np
    from tqdm import tqdm

    from ddil_dist.data.cache import PARTS

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


def _new(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    import numpy as np

    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


if __name__ == "__main__":
    sys.exit(main())
