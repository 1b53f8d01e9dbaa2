"""Writing safetensors files piece by piece: hashed on the way, and telling how far they are.

safetensors' own `save_file` tells nothing before its end, and a file that it wrote would have to be read again for its
digest. What is written here it reads. The format: 8 bytes with the header's size, little-endian; the header, JSON with
every tensor's dtype, shape and place; and the tensors' bytes, without a hole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

CHUNK_BYTES: Final = 1 << 22
SYNC_BYTES: Final = 1 << 28
"""Between two waits for the disk: what was written is there, and the last wait is not for the whole file."""
ALIGNMENT: Final = 8
DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Written:
    """What a file must be found to be."""

    digest: str
    size_bytes: int


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, on_bytes: Callable[[int], None] = lambda num: None
) -> Written:
    """Write a safetensors file and have it on the disk. Raises OSError where that cannot be.

    tensors: contiguous, on the CPU. on_bytes: told after every piece how many bytes it had.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # each aligned to its own size
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        assert tensor.is_contiguous(), name
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    pieces = [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes_of(tensors[name]) for name in order)]
    digest, size_bytes, synced = hashlib.blake2b(digest_size=16), 0, 0
    with path.open("wb") as file:
        for piece in pieces:
            for start in range(0, len(piece), CHUNK_BYTES):
                chunk = piece[start : start + CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
                size_bytes += len(chunk)
                if size_bytes - synced >= SYNC_BYTES:
                    _sync(file)
                    synced = size_bytes
                on_bytes(len(chunk))
        _sync(file)
    return Written(digest.hexdigest(), size_bytes)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
