"""Nested states in one safetensors file: tensors as tensors, everything else as JSON beside them.

Optimizers, generators and buffers describe themselves with dicts of tensors, arrays, bytes and plain values. Nothing is
ever pickled: what these files can hold is data. What was saved comes back equal and of the same types: tuples as
tuples, keys that are numbers as numbers, integers of any length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddil_dist.errors import CheckpointError
from learner.tensor_file import write_tensors

MARK: Final = "$"
"""The key of a JSON object that stands for something that JSON has not."""
PLAIN, BYTES = "plain", "bytes"


def encode_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """A nested state as the tensors of its file: copies. Raises TypeError for what these files do not hold."""
    writer = _Writer()
    plain = json.dumps(writer.encode(state)).encode()
    return {**writer.tensors, PLAIN: _of_bytes(plain), BYTES: _of_bytes(bytes(writer.blob))}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a nested state. Raises TypeError for a value of a kind that these files do not hold."""
    write_tensors(path, encode_state(state))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; raises CheckpointError if it is missing or no such file."""
    try:
        tensors = load_file(path)
        plain = json.loads(tensors[PLAIN].numpy().tobytes())
        state = _decode(plain, tensors, tensors[BYTES].numpy().data)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable state file ({error})") from error
    assert isinstance(state, dict)
    return state


class _Writer:
    """Turns a state into JSON, and collects what JSON cannot hold."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.blob = bytearray()

    def encode(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | str | float):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        if isinstance(value, tuple):
            return {MARK: "tuple", "items": [self.encode(item) for item in value]}
        if isinstance(value, dict):
            if all(isinstance(key, str) and key != MARK for key in value):
                return {key: self.encode(item) for key, item in value.items()}
            return {MARK: "dict", "items": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, bytes):
            begin = len(self.blob)
            self.blob += value
            return {MARK: "bytes", "span": [begin, len(self.blob)]}
        if isinstance(value, Tensor):
            return {MARK: "tensor", "key": self._keep(at_rest(value))}
        if isinstance(value, np.ndarray):
            return {MARK: "array", "key": self._keep(torch.from_numpy(np.array(value, order="C")))}
        raise TypeError(f"a state holds a {type(value).__name__}, which its file cannot")

    def _keep(self, copy: Tensor) -> str:
        """The key of a tensor that shares its memory with no other."""
        key = str(len(self.tensors))
        self.tensors[key] = copy
        return key


def _decode(value: Any, tensors: dict[str, Tensor], blob: memoryview) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors, blob) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(MARK)
    if kind is None:
        return {key: _decode(item, tensors, blob) for key, item in value.items()}
    if kind == "bytes":
        begin, end = value["span"]
        return blob[begin:end].tobytes()
    if kind == "tensor":
        return tensors[value["key"]]
    if kind == "array":
        return tensors[value["key"]].numpy()
    items = [_decode(item, tensors, blob) for item in value["items"]]
    return tuple(items) if kind == "tuple" else dict(items)


def at_rest(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, which shares no memory."""
    kept = tensor.detach()
    return kept.clone(memory_format=torch.contiguous_format) if kept.is_cpu else kept.contiguous().cpu()


def _of_bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
