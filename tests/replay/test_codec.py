"""The record codec: any state survives it, nothing else gets through it."""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddil_dist.errors import RecordError
from ddil_dist.replay.codec import CARRIERS, MAX_SIDE, SCHEMA, Record, decode, encode, encode_parts
from ddil_dist.types import Latent, LatentState, StateSource

from .support import make_state

INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def latents(draw: st.DrawFn) -> tuple[Latent, Latent | None]:
    dtype = draw(st.sampled_from(sorted(CARRIERS)))
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=6))
    bits = draw(hnp.arrays(np.uint8, (*shape[:2], shape[2] * CARRIERS[dtype].itemsize)))
    array = bits.view(CARRIERS[dtype])
    return Latent(array, dtype), Latent(array[::-1], dtype) if draw(st.booleans()) else None


@st.composite
def states(draw: st.DrawFn) -> LatentState:
    latent, label = draw(latents())
    return LatentState(
        latent=latent,
        timestep=draw(st.integers(-1, 999)),
        prompt=draw(st.text(max_size=200)),
        guidance_scale=draw(st.floats(allow_nan=False)),
        source=draw(st.sampled_from([StateSource.FORWARD, StateSource.STUDENT, StateSource.TEACHER])),
        policy_version=draw(st.none() | st.integers(0, 2**31 - 1)),
        trajectory_id=draw(INT64),
        step_index=draw(INT64),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        label=label,
        label_version=draw(st.none() | st.text(max_size=10)),
    )


def header_of(record: bytes) -> list[Any]:
    return list(msgpack.unpackb(msgpack.unpackb(record)[1], unicode_errors="surrogatepass"))


def rebuild(record: bytes, **changes: Any) -> bytes:
    """The record with changes: `schema`, `header` (a list), `latent`, `label`."""
    schema, header, latent, label = msgpack.unpackb(record)
    parts = {"schema": schema, "header": msgpack.unpackb(header), "latent": latent, "label": label} | changes

    def bin32(data: bytes | None) -> bytes:
        return b"\xc0" if data is None else struct.pack(">BI", 0xC6, len(data)) + data

    packed = msgpack.packb(parts["header"])
    return bytes([0x94, parts["schema"]]) + bin32(packed) + bin32(parts["latent"]) + bin32(parts["label"])


class TestRoundTrip:
    @given(states())
    @settings(max_examples=200, deadline=None)
    def test_any_state_survives(self, state: LatentState) -> None:
        back = decode(encode(state)).to_state()
        for field in fields(LatentState):
            ours, theirs = getattr(state, field.name), getattr(back, field.name)
            if isinstance(ours, Latent):
                assert theirs.dtype == ours.dtype
                assert theirs.array.dtype == ours.array.dtype
                assert theirs.array.shape == ours.array.shape
                assert theirs.array.tobytes() == ours.array.tobytes()  # bit for bit, NaN included
            else:
                assert theirs == ours

    @pytest.mark.parametrize(
        "prompt", ["", "x" * 1_000_000, "雨の日の猫", "שלום עולם", "\ud800 alone", "a\0b", "🏔️" * 99]
    )
    def test_prompts_of_any_length_and_script(self, prompt: str) -> None:
        assert decode(encode(make_state(0, prompt=prompt))).prompt == prompt

    def test_a_record_is_plain_msgpack_with_a_schema_number(self) -> None:
        schema, header, latent, label = msgpack.unpackb(encode(make_state(3, prompt="p")))
        assert schema == SCHEMA == 1
        assert msgpack.unpackb(header) == [0, 2, 3, 4, 999, "p", 3.0, 1, 0, 3, 0, 3, None]
        assert latent == np.full((2, 3, 4), 3, np.float32).tobytes()
        assert label is None

    def test_latents_are_viewed_not_copied(self) -> None:
        state = make_state(0)
        parts, size = encode_parts(state)
        assert size == len(encode(state))
        assert np.shares_memory(np.frombuffer(parts[1], np.uint8), state.latent.array)
        record = encode(state)
        found = decode(record)
        assert np.shares_memory(found.array(found.latent_begin), np.frombuffer(record, np.uint8))


class TestRefusal:
    RECORD = encode(make_state(0, labelled=True))

    @given(st.data())
    @settings(max_examples=300, deadline=None)
    def test_a_truncated_record_is_refused(self, data: st.DataObject) -> None:
        cut = data.draw(st.integers(0, len(self.RECORD) - 1))
        with pytest.raises(RecordError):
            decode(self.RECORD[:cut])

    @given(st.data())
    @settings(max_examples=500, deadline=None)
    def test_a_damaged_record_is_refused_or_still_well_formed(self, data: st.DataObject) -> None:
        damaged = bytearray(self.RECORD)
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, 120))] = data.draw(st.integers(0, 255))
        self.check_refused_or_well_formed(bytes(damaged))

    @given(st.binary(max_size=300))
    @settings(max_examples=500, deadline=None)
    def test_any_bytes_are_refused_or_well_formed(self, data: bytes) -> None:
        self.check_refused_or_well_formed(data)

    @staticmethod
    def check_refused_or_well_formed(data: bytes) -> None:
        try:
            record: Record = decode(data)
        except RecordError:
            return
        assert record.array(record.latent_begin).shape == record.shape
        assert type(record.timestep) is int
        assert type(record.prompt) is str
        assert record.source in tuple(StateSource)

    def test_a_newer_schema_is_refused(self) -> None:
        with pytest.raises(RecordError, match="a record of schema 2; this code reads schema 1: upgrade this process"):
            decode(rebuild(self.RECORD, schema=2))

    @pytest.mark.parametrize(
        ("position", "value", "message"),
        [
            (0, 9, "absurd: dtype 9"),
            (1, 0, "absurd"),
            (1, MAX_SIDE + 1, "absurd"),
            (2, 2**40, "absurd"),
            (3, -1, "absurd"),
            (1, 3, "its shape and dtype need 144"),
            (4, "soon", "wrong type"),
            (4, True, "wrong type"),
            (5, 7, "wrong type"),
            (6, 3, "wrong type"),
            (7, 4, "out of range: source 4"),
            (8, -2, "out of range"),
            (8, 1.0, "wrong type"),
            (9, 2**63, "out of range"),
            (10, None, "wrong type"),
            (12, 3, "wrong type"),
        ],
    )
    def test_a_wrong_field_is_refused(self, position: int, value: Any, message: str) -> None:
        header = header_of(self.RECORD)
        header[position] = value
        with pytest.raises(RecordError, match=message):
            decode(rebuild(self.RECORD, header=header))

    def test_a_header_of_another_length_is_refused(self) -> None:
        with pytest.raises(RecordError, match="13 fields expected"):
            decode(rebuild(self.RECORD, header=header_of(self.RECORD)[:-1]))
        with pytest.raises(RecordError, match="13 fields expected"):
            decode(rebuild(self.RECORD, header={"a": 1}))

    def test_bytes_after_the_end_are_refused(self) -> None:
        with pytest.raises(RecordError, match="3 bytes follow the record's end"):
            decode(self.RECORD + b"abc")

    def test_a_pickle_is_not_even_looked_at(self) -> None:
        with pytest.raises(RecordError, match="not a replay record"):
            decode(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"latent": Latent(np.zeros((2, 2), np.float32), "float32")}, r"shape \(2, 2\); expected \[C, H, W\]"),
            ({"latent": Latent(np.zeros((2, 0, 2), np.float32), "float32")}, "each 1 to 65536"),
            ({"latent": Latent(np.zeros((2, 2, 2), np.float64), "float32")}, "is float64; float32 travels as float32"),
            ({"latent": Latent(np.zeros((2, 2, 2), np.float32), "bfloat16")}, "bfloat16 travels as uint16"),
            ({"latent": Latent(np.zeros((2, 2, 2), np.float32), "float8")}, "choose one of float32, float16, bfloat16"),
            ({"label": Latent(np.zeros((2, 3, 5), np.float32), "float32")}, "a label has its latent's dtype and shape"),
            ({"timestep": -2}, "timestep: -2"),
            ({"policy_version": -1}, "policy_version: -1"),
            ({"policy_version": 2**31}, "policy_version"),
            ({"trajectory_id": 2**63}, "trajectory_id: .*64 bits"),
            ({"seed": 2**64}, "cannot be written as a record"),
            ({"prompt": b"bytes"}, "prompt is bytes; it must be a text"),
            ({"source": 4}, "source: 4; it is one of FORWARD, STUDENT, TEACHER, NOISE"),
        ],
    )
    def test_a_state_that_breaks_a_rule_is_not_written(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(RecordError, match=message):
            encode(make_state(0, **changes))
