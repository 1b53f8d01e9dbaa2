"""Sample grids: one PNG strip a policy, the same prompts and noises in the same columns, and a file that names them.

samples/teacher_32_steps.png     n images side by side, without margins
samples/student_4_steps.png
samples/grid.json                {"captions": [n texts], "rows": [{"label": ..., "file": ...}, ...]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddil_dist.errors import DataError

SAMPLES_DIR = "samples"
GRID_FILE = "grid.json"


@dataclass(frozen=True)
class SampleRow:
    """One policy's images."""

    label: str
    images: Sequence[Image.Image]
    """RGB, one a caption."""


@dataclass(frozen=True)
class SampleGrid:
    """Rows of images of the same prompts from the same noises."""

    captions: Sequence[str]
    rows: Sequence[SampleRow]


def save_sample_rows(run_dir: Path, rows: Sequence[tuple[str, Any]], captions: Sequence[str]) -> Path:
    """Write rows of (label, images) under `run_dir/samples` and return the path of grid.json.

    images: float [n, 3, H, W] in [0, 1], a torch tensor on any device or an array; n = len(captions) in every row,
    column j of each row from the same noise and prompt. Rows written before are replaced.
    """
    folder = run_dir / SAMPLES_DIR
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, str]] = []
    for label, images in rows:
        array = np.asarray(images.detach().float().cpu() if hasattr(images, "detach") else images, dtype=np.float32)
        assert array.ndim == 4, f"{label}: images are [n, 3, H, W], got {array.shape}"
        assert array.shape[:2] == (len(captions), 3), f"{label}: {array.shape} for {len(captions)} captions"
        levels = np.clip(np.rint(array * 255), 0, 255).astype(np.uint8)
        strip = np.concatenate(list(levels.transpose(0, 2, 3, 1)), axis=1)
        name = _file_name(label, {entry["file"] for entry in entries})
        Image.fromarray(strip).save(folder / name)
        entries.append({"label": label, "file": name})
    path = folder / GRID_FILE
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"captions": list(captions), "rows": entries}, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)
    for stale in set(folder.glob("*.png")) - {folder / entry["file"] for entry in entries}:
        stale.unlink()
    return path


def read_sample_grid(run_dir: Path) -> SampleGrid | None:
    """The grid under `run_dir`, None if none was saved; raises DataError if its files do not fit together."""
    path = run_dir / SAMPLES_DIR / GRID_FILE
    if not path.is_file():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        captions = [str(caption) for caption in plain["captions"]]
        rows = [
            SampleRow(str(row["label"]), _cut(path.parent / Path(row["file"]).name, len(captions)))
            for row in plain["rows"]
        ]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{SAMPLES_DIR}/{GRID_FILE}: not readable as a sample grid ({error!r})") from error
    return SampleGrid(captions, rows)


def _cut(path: Path, num: int) -> list[Image.Image]:
    """The `num` images of a strip."""
    with Image.open(path) as strip:
        width, rest = divmod(strip.width, num) if num else (0, 1)
        if rest:
            raise ValueError(f"{path.name} is {strip.width} wide, which {num} images do not divide")
        return [strip.convert("RGB").crop((i * width, 0, (i + 1) * width, strip.height)) for i in range(num)]


def _file_name(label: str, taken: set[str]) -> str:
    """A plain file name for a label, unlike those taken."""
    stem = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")[:60] or "row"
    name, number = f"{stem}.png", 2
    while name in taken:
        name, number = f"{stem}_{number}.png", number + 1
    return name
