"""Fashion-MNIST from the Debian package's files: images, labels, and the captioned Parquet that ships.

Reads the four gzipped IDX files, pads 28x28 to 32x32 and keeps one grey channel in memory; a batch becomes RGB
only when a network needs it. Writes `data/train.parquet` in the layout of Hugging Face image datasets, and
`data/prompts.txt`.
"""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddil_dist.builtin.captions import CLASS_NAMES, caption, evaluation_caption

DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
NUM_SHIPPED = 4096
NUM_PROMPTS = 1000


@dataclass(frozen=True)
class Split:
    """One split of the dataset."""

    images: Tensor
    """[N, 1, 32, 32] uint8, grey, black margins."""
    labels: Tensor
    """[N] int64, 0 to 9."""

    def captions(self) -> list[str]:
        """The caption of every image, by its index."""
        return [caption(index, label) for index, label in enumerate(self.labels.tolist())]


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes (LeCun's MNIST format): magic 0x0000080n, n big-endian sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes (it begins with {raw[:4]!r}); reinstall the dataset")
    num_axes = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(num_axes))
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def load_split(data_dir: Path, name: str) -> Split:
    """Load `train` (60,000 images) or `t10k` (10,000) from a folder of Fashion-MNIST's own files."""
    images_file, labels_file = (data_dir / f"{name}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    for path in (images_file, labels_file):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; `apt-get install dataset-fashion-mnist` puts it into {DEBIAN_DIR}, "
                "or name a folder that holds the dataset's four .gz files with --data"
            )
    padded = np.pad(_read_idx(images_file), ((0, 0), (2, 2), (2, 2)))
    return Split(torch.from_numpy(padded)[:, None], torch.from_numpy(_read_idx(labels_file).astype(np.int64)))


def to_rgb(images: Tensor) -> Tensor:
    """[B, 1, 32, 32] uint8 grey to [B, 3, 32, 32] float32 RGB in [0, 1]."""
    return (images.float() / 255).expand(-1, 3, -1, -1)


def balanced_indices(labels: Tensor, num: int) -> list[int]:
    """The first images of each class in turn, `num` in all, in the order of the dataset."""
    per_class = [torch.nonzero(labels == c).flatten().tolist() for c in range(len(CLASS_NAMES))]
    return sorted(per_class[k % len(CLASS_NAMES)][k // len(CLASS_NAMES)] for k in range(num))


def write_parquet(split: Split, path: Path, *, num: int = NUM_SHIPPED) -> None:
    """Write `num` captioned images: columns `image` (struct of bytes, a grey PNG, and path) and `text`.

    Grey halves the file; readers convert to RGB, which gives three equal channels.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for index in balanced_indices(split.labels, num):
        png = io.BytesIO()
        Image.fromarray(split.images[index, 0].numpy()).save(png, "PNG", optimize=True)
        text = caption(index, int(split.labels[index]))
        rows.append({"image": {"bytes": png.getvalue(), "path": f"{index:05d}.png"}, "text": text})
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = '{"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}'
    schema = pa.schema([("image", image_type), ("text", pa.string())], metadata={"huggingface": features})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", row_group_size=1024)


def write_prompts(path: Path, *, num: int = NUM_PROMPTS) -> None:
    """Write one caption a line; line i (from 0) is of class i mod 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(evaluation_caption(line)[0] + "\n" for line in range(num)), encoding="utf-8")
