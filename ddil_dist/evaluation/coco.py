"""COCO as papers use it: one caption an image, the images whole (Lin et al. 2014; Chen et al. 2015).

coco2017-5k    val2017/ with annotations/captions_val2017.json, all of its 5,000 images
coco2014-30k   val2014/ with annotations/captions_val2014.json, 30,000 of them by a seed
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from ddil_dist.data.decoding import decode_image
from ddil_dist.errors import DataError

SEED: Final = 0
PRESETS: Final = {"coco2017-5k": ("2017", 5_000), "coco2014-30k": ("2014", 30_000)}


@dataclass(frozen=True)
class CocoCaptions:
    """Images and one caption of each."""

    files: list[Path]
    captions: list[str]

    @classmethod
    def open(cls, directory: Path, preset: str) -> CocoCaptions:
        """The preset's rows in `directory`: of each image its caption of the lowest number, in the images' order.

        Raises DataError where the files are not those, or too few.
        """
        year, num = PRESETS[preset]
        file = directory / "annotations" / f"captions_val{year}.json"
        folder = directory / f"val{year}"
        if not file.is_file() or not folder.is_dir():
            raise DataError(
                f"{preset}: needs {file} and the folder {folder}; get val{year}.zip and annotations_trainval{year}.zip "
                "from COCO's site"
            )
        try:
            told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            names = {int(image["id"]): str(image["file_name"]) for image in told["images"]}
            first: dict[int, tuple[int, str]] = {}
            for annotation in told["annotations"]:
                row = (int(annotation["id"]), " ".join(str(annotation["caption"]).split()))
                image = int(annotation["image_id"])
                first[image] = min(first.get(image, row), row)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: is no file of COCO captions ({error!r})") from error
        images = sorted(first.keys() & names.keys())
        if len(images) < num:
            raise DataError(f"{preset}: {file} has captions of {len(images)} images, the preset takes {num}")
        if len(images) > num:
            chosen = np.random.default_rng(SEED).choice(len(images), num, replace=False)
            images = [images[index] for index in sorted(chosen)]
        return cls([folder / names[image] for image in images], [first[image][1] for image in images])

    def image(self, row: int, size: int) -> Tensor:
        """A real image [3, size, size] in [0, 1], its middle square. Raises DataError where it does not decode."""
        try:
            return (decode_image(self.files[row].read_bytes(), size=size, background="white") + 1) / 2
        except Exception as error:  # decoders raise anything at damaged bytes
            raise DataError(f"{self.files[row]}: is not there, or does not decode ({error})") from error
