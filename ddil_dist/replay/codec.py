"""The replay record: a `LatentState` as msgpack, with no copy of a latent beyond one, and no torch.

A record is a msgpack array of four: the schema number, the header (a msgpack array inside a bin, so that it can be
read by itself), the latent's bytes, and the label's bytes or nil. The header holds, in order: dtype code, C, H, W,
timestep, prompt, guidance_scale, source, policy_version or nil, trajectory_id, step_index, seed, label_version or nil.
Latents are C-contiguous and little-endian; bfloat16 travels as its 16-bit patterns.

Encoding hands out the array's own memory beside a few bytes of framing: the join into the command is the one copy.
Decoding views the received bytes; the row of the output array is the one copy. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack
import numpy as np
import numpy.typing as npt

from ddil_dist.errors import RecordError
from ddil_dist.types import Latent, LatentState, StateSource

SCHEMA: Final = 1
"""Number of the record layout that this code writes. It reads its own and older ones."""

MAX_SIDE: Final = 65_536
"""Largest C, H or W that is believed."""

MAX_RECORD_BYTES: Final = 256 * 2**20
"""Largest record that is written or believed; Redis itself stops at 512 MiB."""

DTYPES: Final[tuple[tuple[str, np.dtype[Any]], ...]] = (
    ("float32", np.dtype("<f4")),
    ("float16", np.dtype("<f2")),
    ("bfloat16", np.dtype("<u2")),
)
"""Latent dtypes by their code in a record, with the array dtype that carries each."""

CARRIERS: Final = dict(DTYPES)
"""Array dtype that carries a latent dtype."""

_CODES: Final = {name: code for code, (name, _) in enumerate(DTYPES)}
_SOURCES: Final = tuple(StateSource)
_HEADER_FIELDS: Final = 13
_INT_OR_NONE: Final = (int, type(None))
_STR_OR_NONE: Final = (str, type(None))
_FRAME: Final = 0x94  # msgpack: an array of four
_NIL: Final = 0xC0
_BIN32: Final = struct.Struct(">BI")
_INT64: Final = range(-(2**63), 2**63)

assert sys.byteorder == "little", "records are views of little-endian memory"


@dataclass(slots=True)
class Record:
    """A decoded record. It views the received bytes: copy the latents out before those go.

    data           the whole record.
    dtype          of latent and label, as in `Latent`.
    shape          (C, H, W).
    latent_begin   where the latent's `num_bytes` bytes begin in `data`.
    label_begin    where the label's begin; None without a label.
    The other fields are those of `LatentState`.
    """

    data: memoryview
    dtype: str
    shape: tuple[int, int, int]
    num_bytes: int
    latent_begin: int
    label_begin: int | None
    timestep: int
    prompt: str
    guidance_scale: float
    source: int
    policy_version: int | None
    trajectory_id: int
    step_index: int
    seed: int
    label_version: str | None

    @property
    def layout(self) -> str:
        """Dtype and shape in one word, such as `float32:4x64x64`: the same for all records of a buffer."""
        return layout_of(self.dtype, self.shape)

    def array(self, begin: int) -> npt.NDArray[Any]:
        """[C, H, W] view of the latent or label that begins at `begin`."""
        kind = CARRIERS[self.dtype]
        return np.frombuffer(self.data, kind, self.num_bytes // kind.itemsize, begin).reshape(self.shape)

    def to_state(self) -> LatentState:
        """The state with latents of its own."""
        label = None if self.label_begin is None else Latent(self.array(self.label_begin).copy(), self.dtype)
        return LatentState(
            latent=Latent(self.array(self.latent_begin).copy(), self.dtype),
            timestep=self.timestep,
            prompt=self.prompt,
            guidance_scale=self.guidance_scale,
            source=StateSource(self.source),
            policy_version=self.policy_version,
            trajectory_id=self.trajectory_id,
            step_index=self.step_index,
            seed=self.seed,
            label=label,
            label_version=self.label_version,
        )


def layout_of(dtype: str, shape: Sequence[int]) -> str:
    """Dtype and shape in one word, such as `float32:4x64x64`."""
    return f"{dtype}:{'x'.join(map(str, shape))}"


def encode_parts(state: LatentState) -> tuple[list[Any], int]:
    """Buffers that make up a record when joined, and their total size in bytes.

    The latents are views of the state's arrays. Raises RecordError where the state breaks a rule of `LatentState`.
    """
    latent = _checked(state.latent, "latent")
    code = _CODES[state.latent.dtype]
    _check_fields(state)
    try:
        header = msgpack.packb(
            [
                code,
                *latent.shape,
                int(state.timestep),
                state.prompt,
                float(state.guidance_scale),
                int(state.source),
                None if state.policy_version is None else int(state.policy_version),
                int(state.trajectory_id),
                int(state.step_index),
                int(state.seed),
                state.label_version,
            ],
            unicode_errors="surrogatepass",
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"a state cannot be written as a record: {error}; see LatentState for its fields") from error
    framing = struct.pack(">BBBI", _FRAME, SCHEMA, 0xC6, len(header)) + header + _BIN32.pack(0xC6, latent.nbytes)
    parts: list[Any] = [framing, latent.view(np.uint8).reshape(-1).data]
    size = len(framing) + latent.nbytes
    if state.label is None:
        parts.append(b"\xc0")
        size += 1
    else:
        label = _checked(state.label, "label")
        if state.label.dtype != state.latent.dtype or label.shape != latent.shape:
            raise RecordError(
                f"label is {layout_of(state.label.dtype, label.shape)}, the latent "
                f"{layout_of(state.latent.dtype, latent.shape)}; a label has its latent's dtype and shape"
            )
        parts += [_BIN32.pack(0xC6, label.nbytes), label.view(np.uint8).reshape(-1).data]
        size += 5 + label.nbytes
    if size > MAX_RECORD_BYTES:
        raise RecordError(f"a record of {size} bytes exceeds {MAX_RECORD_BYTES}; is the latent's shape right?")
    return parts, size


def encode(state: LatentState) -> bytes:
    """The record of a state. Raises RecordError where the state breaks a rule of `LatentState`."""
    return b"".join(encode_parts(state)[0])


def decode(record: bytes | memoryview) -> Record:
    """Read a record without copying its latents.

    Raises RecordError on a newer schema, a truncated record, a wrong type or an absurd dimension.
    """
    view = memoryview(record)
    size = len(view)
    if size < 7 or view[0] != _FRAME:
        raise RecordError(f"not a replay record: {size} bytes that begin with {bytes(view[:4])!r}")
    schema = view[1]
    if schema != SCHEMA:
        raise RecordError(
            f"a record of schema {schema}; this code reads schema {SCHEMA}: "
            + ("upgrade this process" if schema > SCHEMA else "the record is damaged")
        )
    begin, end = _bin(view, 2)
    header = _header(view[begin:end])
    name, carrier = DTYPES[header[0]]
    shape = (header[1], header[2], header[3])
    num_bytes = header[1] * header[2] * header[3] * carrier.itemsize
    latent_begin, end = _latent(view, end, num_bytes, "latent")
    label_begin = None
    if end < size and view[end] == _NIL:
        end += 1
    else:
        label_begin, end = _latent(view, end, num_bytes, "label")
    if end != size:
        raise RecordError(f"{size - end} bytes follow the record's end")
    return Record(view, name, shape, num_bytes, latent_begin, label_begin, *header[4:])


def _checked(latent: Latent, field: str) -> npt.NDArray[Any]:
    """The latent's array, C-contiguous; raises RecordError on a wrong dtype or shape."""
    expected = CARRIERS.get(latent.dtype)
    if expected is None:
        raise RecordError(f"{field}.dtype: {latent.dtype!r}; choose one of {', '.join(_CODES)}")
    array = latent.array
    if not isinstance(array, np.ndarray) or (array.dtype is not expected and array.dtype != expected):
        found = getattr(array, "dtype", type(array).__name__)
        raise RecordError(f"{field}.array is {found}; {latent.dtype} travels as {expected.name}")
    if array.ndim != 3 or min(array.shape) < 1 or max(array.shape) > MAX_SIDE:
        raise RecordError(f"{field}.array has shape {array.shape}; expected [C, H, W], each 1 to {MAX_SIDE}")
    return np.ascontiguousarray(array)


def _check_fields(state: LatentState) -> None:
    if not -1 <= state.timestep < 2**15:
        raise RecordError(f"timestep: {state.timestep}; it must lie on a training grid, 0 to {2**15 - 1}")
    if state.source not in _SOURCES:
        raise RecordError(f"source: {state.source!r}; it is one of {', '.join(source.name for source in StateSource)}")
    if state.policy_version is not None and not 0 <= state.policy_version < 2**31:
        raise RecordError(f"policy_version: {state.policy_version}; it must be None or 0 to {2**31 - 1}")
    for name in ("trajectory_id", "step_index"):
        if getattr(state, name) not in _INT64:
            raise RecordError(f"{name}: {getattr(state, name)}; it must fit in 64 bits")
    if not isinstance(state.prompt, str):
        raise RecordError(f"prompt is {type(state.prompt).__name__}; it must be a text")


def _bin(view: memoryview, at: int) -> tuple[int, int]:
    """Begin and end of the msgpack bin32 at `at`; raises RecordError where there is none or it is cut off."""
    if at + 5 > len(view):
        raise RecordError(f"the record is truncated at {len(view)} bytes")
    tag, length = _BIN32.unpack_from(view, at)
    if tag != 0xC6:
        raise RecordError(f"byte {at} is 0x{tag:02x} where bytes (0xc6) should begin: the record is damaged")
    if at + 5 + length > len(view):
        raise RecordError(f"the record is truncated: {at + 5 + length} bytes expected, {len(view)} found")
    return at + 5, at + 5 + length


def _latent(view: memoryview, at: int, num_bytes: int, field: str) -> tuple[int, int]:
    begin, end = _bin(view, at)
    if end - begin != num_bytes:
        raise RecordError(f"{field} has {end - begin} bytes, its shape and dtype need {num_bytes}")
    return begin, end


def _header(view: memoryview) -> list[Any]:
    """The header's fields, of the right types and in range; raises RecordError."""
    try:
        header = msgpack.unpackb(view, unicode_errors="surrogatepass", strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise RecordError(f"the record's header cannot be read: {error!r}") from None
    if type(header) is not list or len(header) != _HEADER_FIELDS:
        raise RecordError(f"the record's header has the wrong form; {_HEADER_FIELDS} fields expected")
    code, c, h, w, timestep, prompt, guidance, source, version, trajectory, step, seed, made_by = header
    integers = type(code) is type(c) is type(h) is type(w) is type(timestep) is type(source) is type(trajectory)
    if not (
        integers
        and type(code) is type(step) is type(seed) is int
        and type(prompt) is str
        and type(guidance) is float
        and type(version) in _INT_OR_NONE
        and type(made_by) in _STR_OR_NONE
    ):
        raise RecordError("a field of the record's header has the wrong type")
    if not (0 <= code < len(DTYPES) and 1 <= c <= MAX_SIDE and 1 <= h <= MAX_SIDE and 1 <= w <= MAX_SIDE):
        raise RecordError(f"the record's latent is absurd: dtype {code}, shape [{c}, {h}, {w}]")
    if (
        not 0 <= source < len(_SOURCES)
        or not -1 <= timestep < 2**15
        or not (version is None or 0 <= version < 2**31)
        or not -(2**63) <= trajectory < 2**63
        or not -(2**63) <= step < 2**63
    ):
        raise RecordError(f"the record is out of range: source {source}, timestep {timestep}, version {version}")
    return header
