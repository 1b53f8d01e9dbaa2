"""The replay record: a row of `States` as msgpack, with no copy of a latent beyond one, and no torch.

A record is a msgpack array: the schema number, the header (a msgpack array inside a bin, so that it can be read by
itself), and each latent's bytes or nil. The header holds dtype code, C, H, W, then the recorded fields of `States` that
are numbers or texts, in the order of their declaration; one that ends early is older, and defaults stand in. Latents
are C-contiguous and little-endian; bfloat16 travels as its 16-bit patterns.

Encoding hands out the array's own memory beside a few bytes of framing: the join into the command is the one copy.
Decoding views the received bytes; the row of the output array is the one copy. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Final

import msgpack
import numpy as np
import numpy.typing as npt

from ddil_dist.errors import RecordError
from ddil_dist.states import LATENT_DTYPES, MAX_SIDE, States, layout_of
from ddil_dist.types import NO_POLICY

SCHEMA: Final = 2
"""Number of the record layout that this code writes. It reads older ones."""

FIRST_SCHEMA: Final = 1
FIRST_FIELDS: Final = (
    *("timestep", "prompt", "guidance_scale", "source", "policy_version"),
    *("trajectory_id", "step_index", "seed", "label_version"),
)
"""What the header of schema 1 holds behind the shape, a missing policy version as nil; the last two nobody reads."""

MAX_RECORD_BYTES: Final = 256 * 2**20
"""Largest record that is written or believed; Redis itself stops at 512 MiB."""

_CARRIERS: Final = tuple(LATENT_DTYPES.values())
_FRAME: Final = 0x92  # msgpack: an array of two, and as many latents
_NIL: Final = 0xC0
_BIN32: Final = struct.Struct(">BI")

Shape = tuple[int, int, int]
Rows = npt.NDArray[Any]

assert sys.byteorder == "little", "records are views of little-endian memory"


@dataclass(slots=True)
class Record:
    """A decoded record. It views the received bytes: copy the latents out before those go.

    data       the whole record.
    code       of the latents' dtype, a place in `LATENT_DTYPES`.
    shape      (C, H, W).
    num_bytes  of a latent.
    begins     where each declared latent begins in `data`; None without it.
    values     the other declared fields.
    meta       those of them that are in the metadata: source, timestep, policy version and what is declared besides.
    """

    data: memoryview
    code: int
    shape: Shape
    num_bytes: int
    begins: list[int | None]
    values: list[Any]
    meta: tuple[int, ...]

    @property
    def layout(self) -> str:
        """Dtype and shape in one word, such as `float32:4x64x64`: the same for all records of a buffer."""
        return layout_of(_CARRIERS[self.code], self.shape)

    def array(self, number: int) -> Rows | None:
        """[C, H, W] view of the latent that is declared as this one; None without it."""
        begin, carrier = self.begins[number], _CARRIERS[self.code]
        if begin is None:
            return None
        return np.frombuffer(self.data, carrier, self.num_bytes // carrier.itemsize, begin).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Encoded:
    """States as records.

    layout     dtype and shape of their latents, as in `Record.layout`.
    meta       [B] of `Codec.meta_dtype`.
    records    each as its buffers, which make it up when joined, and its size in bytes.
    """

    layout: str
    meta: Rows
    records: list[tuple[list[Any], int]]

    def joined(self) -> list[bytes]:
        """Each record in one piece."""
        return [b"".join(parts) for parts, _ in self.records]


class Codec:
    """Between rows of `kind`, which is `States` or adds fields to it, and records.

    meta         names of the fields that draws choose by: source, timestep, policy_version and what `kind` adds.
    meta_dtype   what is known of a slot without its record: those, and the record's size in bytes.
    log_dtype    an entry of a shard's log: a slot, and what it holds from then on.
    """

    def __init__(self, kind: type[States[Any]] = States) -> None:
        self.kind = kind
        kinds = kind.kinds()
        self.latents = {name: one for name, one in kinds.items() if one.type is bytes}
        self.values = {name: one for name, one in kinds.items() if one.type is not bytes}
        meta = [(name, one.meta) for name, one in self.values.items() if one.meta is not None]
        self.meta_dtype = np.dtype([*meta, ("size", "<u4")], align=True)
        self.log_dtype = np.dtype([("slot", "<u4"), ("meta", self.meta_dtype)])
        self.meta = tuple(name for name, _ in meta)
        places = {name: 4 + place for place, name in enumerate(self.values)}
        self._meta_of = itemgetter(*(places[name] for name in self.meta))
        self._optional = tuple((name, one.optional) for name, one in self.latents.items())
        self._types = (int, int, int, int, *(one.type for one in self.values.values()))
        self._bounds = tuple((places[name], *one.bounds) for name, one in self.values.items() if one.type is int)
        self._defaults = [one.default for one in self.values.values()]

    def encode(self, states: States[Any]) -> Encoded:
        """The records of states. The latents are views of the states' arrays, where those are contiguous.

        Raises RecordError where a state breaks a rule of the declaration.
        """
        assert type(states) is self.kind, f"{type(states).__name__} given to a codec of {self.kind.__name__}"
        latents, columns = states.checked()
        rows = latents[next(iter(latents))]
        assert rows is not None
        start = [_CARRIERS.index(rows.dtype), *rows.shape[1:]]
        records = [
            _frame(msgpack.packb([*start, *values], unicode_errors="surrogatepass"), row, latents)
            for row, values in enumerate(zip(*columns.values(), strict=True))
        ]
        meta = np.zeros(len(rows), self.meta_dtype)
        for name in self.meta:
            meta[name] = columns[name]
        meta["size"] = [size for _, size in records]
        return Encoded(layout_of(rows.dtype, rows.shape[1:]), meta, records)

    def decode(self, record: bytes | memoryview) -> Record:
        """Read a record without copying its latents.

        Raises RecordError on a newer schema, a truncated record, a wrong type or an absurd dimension.
        """
        view = memoryview(record)
        size = len(view)
        if size < 7 or not _FRAME < view[0] <= 0x9F:
            raise RecordError(f"not a replay record: {size} bytes that begin with {bytes(view[:4])!r}")
        schema = view[1]
        if schema not in (FIRST_SCHEMA, SCHEMA):
            raise RecordError(
                f"a record of schema {schema}; this code reads schemas {FIRST_SCHEMA} to {SCHEMA}: "
                + ("upgrade this process" if schema > SCHEMA else "the record is damaged")
            )
        if view[0] - _FRAME > len(self.latents):
            raise RecordError(f"a record of {view[0] - _FRAME} latents; this code knows {len(self.latents)}")
        begin, end = _bin(view, 2)
        header = self._header(view[begin:end], first=schema == FIRST_SCHEMA)
        code, *sides = header[:4]
        num_bytes = sides[0] * sides[1] * sides[2] * _CARRIERS[code].itemsize
        begins: list[int | None] = []
        written = view[0] - _FRAME
        for name, optional in self._optional:
            if optional and (len(begins) >= written or (end < size and view[end] == _NIL)):
                end += len(begins) < written
                begins.append(None)
                continue
            at, end = _bin(view, end)
            if end - at != num_bytes:
                raise RecordError(f"{name} has {end - at} bytes, its shape and dtype need {num_bytes}")
            begins.append(at)
        if end != size:
            raise RecordError(f"{size - end} bytes follow the record's end")
        return Record(view, code, tuple(sides), num_bytes, begins, header[4:], self._meta_of(header))

    def decode_all(self, records: Sequence[bytes]) -> States[Rows]:
        """The states that these records are of, in their order; at least one."""
        columns = Columns(len(records), self)
        for row, record in enumerate(records):
            columns.put(row, self.decode(record))
        return columns.build(0)

    def _header(self, view: memoryview, *, first: bool) -> list[Any]:
        """The header's fields, of the right types and in range; raises RecordError."""
        try:
            header = msgpack.unpackb(view, unicode_errors="surrogatepass", strict_map_key=True)
        except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
            raise RecordError(f"the record's header cannot be read: {error!r}") from None
        if type(header) is not list:
            raise RecordError("the record's header has the wrong form; a list of fields expected")
        if first:
            header = self._from_first(header)
        if len(header) < len(self._types) and None not in (rest := self._defaults[len(header) - 4 :]):
            header += rest
        if len(header) != len(self._types):
            raise RecordError(f"the record's header has {len(header)} fields; {len(self._types)} expected")
        if tuple(map(type, header)) != self._types:
            raise RecordError("a field of the record's header has the wrong type")
        code, c, h, w = header[:4]
        if not (0 <= code < len(_CARRIERS) and 1 <= c <= MAX_SIDE and 1 <= h <= MAX_SIDE and 1 <= w <= MAX_SIDE):
            raise RecordError(f"the record's latent is absurd: dtype {code}, shape [{c}, {h}, {w}]")
        for place, low, high in self._bounds:
            if not low <= header[place] <= high:
                name = tuple(self.values)[place - 4]
                raise RecordError(f"the record is out of range: {name} {header[place]}, not {low} to {high}")
        return header

    def _from_first(self, header: list[Any]) -> list[Any]:
        """A header of schema 1 in today's order."""
        if len(header) != 4 + len(FIRST_FIELDS):
            raise RecordError(f"the record's header has {len(header)} fields; {4 + len(FIRST_FIELDS)} expected")
        known = dict(zip(FIRST_FIELDS, header[4:], strict=True))
        if known["policy_version"] is None:
            known["policy_version"] = NO_POLICY
        return [*header[:4], *(known.get(name, kind.default) for name, kind in self.values.items())]


class Columns:
    """A sample in the making: `num` rows, each missing until a record is put there; its latents are copied once."""

    def __init__(self, num: int, codec: Codec) -> None:
        self._codec = codec
        self._rows: list[list[Any] | None] = [None] * num
        self._like: tuple[int, Shape] | None = None
        self._latents: list[Rows | None] = [None] * len(codec.latents)
        self._bytes = [memoryview(b"")] * len(codec.latents)
        self._without = [set(range(num)) for _ in codec.latents]

    def missing(self) -> list[int]:
        """Rows that nothing was put into."""
        return [row for row, values in enumerate(self._rows) if values is None]

    def like(self, record: Record) -> bool:
        """Whether the rows so far have this record's dtype and shape."""
        return self._like == (record.code, record.shape)

    def put(self, row: int, record: Record) -> None:
        """Fill a row; what was there before is gone."""
        self._like = record.code, record.shape
        num_bytes = record.num_bytes
        place = row * num_bytes
        for number, begin in enumerate(record.begins):
            if begin is None:
                self._without[number].add(row)
                continue
            if self._latents[number] is None:
                rows = np.empty((len(self._rows), *record.shape), _CARRIERS[record.code])
                self._latents[number], self._bytes[number] = rows, rows.reshape(-1).view(np.uint8).data
            self._bytes[number][place : place + num_bytes] = record.data[begin : begin + num_bytes]
            self._without[number].discard(row)
        self._rows[row] = record.values

    def clear(self) -> None:
        """Every row is missing again."""
        self._rows = [None] * len(self._rows)

    def build(self, newest: int) -> States[Rows]:
        """The sample; no row may be missing. newest: the version that staleness counts from."""
        rows = [values for values in self._rows if values is not None]
        assert len(rows) == len(self._rows), "rows are missing"
        latents = {
            name: None if lacking else latents
            for name, latents, lacking in zip(self._codec.latents, self._latents, self._without, strict=True)
        }
        states = self._codec.kind.of(dict(zip(self._codec.values, zip(*rows, strict=True), strict=True)), **latents)
        versions = states.policy_version
        return replace(states, staleness=np.where(versions == NO_POLICY, 0, np.maximum(newest - versions, 0)))


def _frame(header: bytes, row: int, latents: dict[str, Rows | None]) -> tuple[list[Any], int]:
    """The buffers of one record, and its size."""
    framing = struct.pack(">BBBI", _FRAME + len(latents), SCHEMA, 0xC6, len(header)) + header
    parts: list[Any] = []
    for rows in latents.values():
        if rows is None:
            framing += b"\xc0"
            continue
        latent = rows[row]
        parts += [framing + _BIN32.pack(0xC6, latent.nbytes), latent.view(np.uint8).reshape(-1).data]
        framing = b""
    if framing:
        parts.append(framing)
    size = sum(len(part) for part in parts)
    if size > MAX_RECORD_BYTES:
        raise RecordError(f"a record of {size} bytes exceeds {MAX_RECORD_BYTES}; is the latent's shape right?")
    return parts, size


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
