"""The record codec: any state survives it, nothing else gets through it."""

from __future__ import annotations

import struct
from dataclasses import fields, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddil_dist.errors import RecordError
from ddil_dist.replay.codec import SCHEMA, Codec, Record
from ddil_dist.states import LATENT_DTYPES, MAX_SIDE, States
from ddil_dist.types import NO_POLICY, StateSource
from tests.support.states import Wider

from .support import make_state, make_states, record_of

INT64 = st.integers(-(2**63), 2**63 - 1)
CODEC = Codec()
HEADER = [0, 2, 3, 4, 1, 999, 0, 0, 3, 3.0, "p"]
"""Dtype and shape, source, timestep, policy version, step index, trajectory, guidance scale, prompt."""


@st.composite
def batches(draw: st.DrawFn) -> States[Any]:
    carrier = LATENT_DTYPES[draw(st.sampled_from(sorted(LATENT_DTYPES)))]
    shape = draw(hnp.array_shapes(min_dims=4, max_dims=4, max_side=4))
    bits = draw(hnp.arrays(np.uint8, (*shape[:3], shape[3] * carrier.itemsize)))
    x_t = bits.view(carrier)

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=shape[0], max_size=shape[0]))

    return States.of(
        {
            "source": column(st.integers(0, 3)),
            "timestep": column(st.integers(-1, 999)),
            "policy_version": column(st.integers(NO_POLICY, 2**31 - 1)),
            "step_index": column(INT64),
            "trajectory_id": column(INT64),
            "guidance_scale": column(st.floats(allow_nan=False, width=32)),
            "prompt": column(st.text(max_size=200)),
        },
        x_t=x_t,
        label=x_t[::-1, ::-1] if draw(st.booleans()) else None,
    )


def header_of(record: bytes) -> list[Any]:
    return list(msgpack.unpackb(msgpack.unpackb(record)[1], unicode_errors="surrogatepass"))


def build(header: Any, latents: list[bytes | None], *, schema: int = SCHEMA) -> bytes:
    """A record by hand."""

    def bin32(data: bytes | None) -> bytes:
        return b"\xc0" if data is None else struct.pack(">BI", 0xC6, len(data)) + data

    parts = [bin32(msgpack.packb(header)), *map(bin32, latents)]
    return bytes([0x91 + len(parts), schema]) + b"".join(parts)


def rebuild(record: bytes, **changes: Any) -> bytes:
    """The record with changes: `schema`, `header` (a list), `latents`."""
    schema, header, *latents = msgpack.unpackb(record)
    parts = {"schema": schema, "header": msgpack.unpackb(header), "latents": latents} | changes
    return build(parts["header"], parts["latents"], schema=parts["schema"])


def assert_same(ours: States[Any], theirs: States[Any]) -> None:
    for field in fields(ours):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(one, np.ndarray):
            assert other.dtype == one.dtype
            assert other.shape == one.shape
            assert other.tobytes() == one.tobytes()  # bit for bit, NaN included
        else:
            assert other == one


class TestRoundTrip:
    @given(batches())
    @settings(max_examples=200, deadline=None)
    def test_any_states_survive(self, states: States[Any]) -> None:
        encoded = CODEC.encode(states)
        assert [len(record) for record in encoded.joined()] == encoded.meta["size"].tolist()
        back = CODEC.decode_all(encoded.joined())
        assert_same(states, replace(back, staleness=None))

    @pytest.mark.parametrize(
        "prompt", ["", "x" * 1_000_000, "雨の日の猫", "שלום עולם", "\ud800 alone", "a\0b", "🏔️" * 99]
    )
    def test_prompts_of_any_length_and_script(self, prompt: str) -> None:
        assert CODEC.decode_all([record_of(make_state(0, prompt=prompt))]).prompt == [prompt]

    def test_a_record_is_plain_msgpack_with_a_schema_number(self) -> None:
        schema, header, x_t, label = msgpack.unpackb(record_of(make_state(3, prompt="p")))
        assert schema == SCHEMA == 2
        assert msgpack.unpackb(header) == HEADER
        assert x_t == np.full((2, 3, 4), 3, np.float32).tobytes()
        assert label is None

    def test_latents_are_viewed_not_copied(self) -> None:
        state = make_state(0)
        (parts, size), *_ = CODEC.encode(state).records
        assert size == len(record_of(state))
        assert np.shares_memory(np.frombuffer(parts[1], np.uint8), state.x_t)
        record = record_of(state)
        found = CODEC.decode(record).array(0)
        assert found is not None
        assert np.shares_memory(found, np.frombuffer(record, np.uint8))

    def test_metadata_is_what_draws_choose_by(self) -> None:
        assert CODEC.meta == ("source", "timestep", "policy_version")
        assert CODEC.meta_dtype.itemsize == 12
        meta = CODEC.encode(make_states(0, 3, timestep=749, policy_version=7, source=StateSource.TEACHER)).meta
        assert [tuple(row)[:3] for row in meta.tolist()] == [(2, 749, 7)] * 3
        assert CODEC.decode(record_of(make_state(0, timestep=749))).meta == (1, 749, 0)


class TestOlderRecords:
    X_T, LABEL = (np.full((2, 3, 4), value, np.float32).tobytes() for value in (3, 4))

    def first(self, *, version: int | None = 5, **changes: Any) -> bytes:
        """A record as schema 1 had it."""
        header = [0, 2, 3, 4, 749, "p", 3.0, 1, version, 2**40, 2, 77, "teacher"]
        return build(changes.get("header", header), [self.X_T, self.LABEL], schema=1)

    def test_those_of_schema_1_are_read(self) -> None:
        found = CODEC.decode_all([self.first(), self.first(version=None)])
        expected = {
            "source": [1, 1],
            "timestep": [749, 749],
            "policy_version": [5, NO_POLICY],
            "step_index": [2, 2],
            "trajectory_id": [2**40, 2**40],
            "guidance_scale": [3.0, 3.0],
        }
        assert {name: getattr(found, name).tolist() for name in expected} == expected
        assert found.prompt == ["p", "p"]
        np.testing.assert_array_equal(found.x_t, np.full((2, 2, 3, 4), 3))
        assert found.label is not None
        np.testing.assert_array_equal(found.label, np.full((2, 2, 3, 4), 4))

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [(0, 9, "absurd"), (4, "soon", "wrong type"), (7, 4, "source 4, not 0 to 3"), (8, -2, "policy_version -2")],
    )
    def test_damaged_ones_are_refused(self, place: int, value: Any, message: str) -> None:
        header = [0, 2, 3, 4, 749, "p", 3.0, 1, 5, 2**40, 2, 77, "teacher"]
        header[place] = value
        with pytest.raises(RecordError, match=message):
            CODEC.decode(self.first(header=header))
        with pytest.raises(RecordError, match="12 fields; 13 expected"):
            CODEC.decode(self.first(header=header[:-1]))

    def test_a_field_that_was_not_there_yet_has_its_default(self) -> None:
        old = record_of(make_state(3, labelled=True))
        found = Codec(Wider).decode_all([old])
        assert isinstance(found, Wider)
        assert (found.reward.tolist(), found.judge, found.seen.tolist()) == ([-1.5], ["nobody"], [0])
        assert found.hint is None
        assert found.prompt == ["state 3"]

    def test_what_newer_code_wrote_is_refused(self) -> None:
        (newer,) = Codec(Wider).encode(wider()).joined()
        with pytest.raises(RecordError, match="a record of 3 latents; this code knows 2"):
            CODEC.decode(newer)
        with pytest.raises(RecordError, match="14 fields; 11 expected"):
            CODEC.decode(rebuild(newer, latents=msgpack.unpackb(newer)[2:4]))


def wider() -> Wider[Any]:
    plain = make_state(3)
    columns = {name: getattr(plain, name) for name in Codec().values}
    return Wider.of(columns | {"reward": [2.5], "judge": ["me"], "seen": [9]}, x_t=plain.x_t, hint=plain.x_t + 1)


class TestRefusal:
    RECORD = record_of(make_state(0, labelled=True))

    @given(st.data())
    @settings(max_examples=300, deadline=None)
    def test_a_truncated_record_is_refused(self, data: st.DataObject) -> None:
        cut = data.draw(st.integers(0, len(self.RECORD) - 1))
        with pytest.raises(RecordError):
            CODEC.decode(self.RECORD[:cut])

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
            record: Record = CODEC.decode(data)
        except RecordError:
            return
        found = record.array(0)
        assert found is not None
        assert found.shape == record.shape
        values = dict(zip(CODEC.values, record.values, strict=True))
        assert type(values["timestep"]) is int
        assert type(values["prompt"]) is str
        assert values["source"] in tuple(StateSource)

    def test_a_newer_schema_is_refused(self) -> None:
        with pytest.raises(RecordError, match="schema 3; this code reads schemas 1 to 2: upgrade"):
            CODEC.decode(rebuild(self.RECORD, schema=3))

    @pytest.mark.parametrize(
        ("position", "value", "message"),
        [
            (0, 9, "absurd: dtype 9"),
            (1, 0, "absurd"),
            (1, MAX_SIDE + 1, "absurd"),
            (2, 2**40, "absurd"),
            (3, -1, "absurd"),
            (1, 3, "its shape and dtype need 144"),
            (4, 4, "out of range: source 4, not 0 to 3"),
            (5, "soon", "wrong type"),
            (5, True, "wrong type"),
            (5, -2, "out of range: timestep"),
            (6, -2, "out of range: policy_version"),
            (6, 1.0, "wrong type"),
            (6, None, "wrong type"),
            (7, None, "wrong type"),
            (8, 2**63, "out of range: trajectory_id"),
            (9, 3, "wrong type"),
            (10, 7, "wrong type"),
        ],
    )
    def test_a_wrong_field_is_refused(self, position: int, value: Any, message: str) -> None:
        header = header_of(self.RECORD)
        header[position] = value
        with pytest.raises(RecordError, match=message):
            CODEC.decode(rebuild(self.RECORD, header=header))

    def test_a_header_of_another_length_is_refused(self) -> None:
        with pytest.raises(RecordError, match="10 fields; 11 expected"):
            CODEC.decode(rebuild(self.RECORD, header=header_of(self.RECORD)[:-1]))
        with pytest.raises(RecordError, match="wrong form"):
            CODEC.decode(rebuild(self.RECORD, header={"a": 1}))

    def test_bytes_after_the_end_are_refused(self) -> None:
        with pytest.raises(RecordError, match="3 bytes follow the record's end"):
            CODEC.decode(self.RECORD + b"abc")

    def test_a_pickle_is_not_even_looked_at(self) -> None:
        with pytest.raises(RecordError, match="not a replay record"):
            CODEC.decode(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x_t": np.zeros((2, 2, 2), np.float32)}, r"shape \(2, 2, 2\); expected \[B, C, H, W\]"),
            ({"x_t": np.zeros((1, 2, 0, 2), np.float32)}, "each 1 to 65536"),
            ({"x_t": np.zeros((1, 2, 2, 2), np.float64)}, "x_t is float64; it must be float32"),
            (
                {"label": np.zeros((1, 2, 3, 5), np.float32)},
                "label is float32:2x3x5 of 1 states, the others float32:2x",
            ),
            (
                {"label": np.zeros((1, 2, 3, 4), np.float16)},
                "label is float16:2x3x4 of 1 states, the others float32:2x",
            ),
            ({"timestep": -2}, "timestep: -2"),
            ({"policy_version": -2}, "policy_version: -2"),
            ({"policy_version": 2**31}, "policy_version: 2147483648; it must be -1 to 2147483647"),
            ({"step_index": 1.5}, "step_index: 1.5 is float; it must be int"),
            ({"prompt": b"bytes"}, "prompt: b'bytes' is bytes; it must be str"),
            ({"source": 4}, "source: 4; it must be 0 to 3"),
        ],
    )
    def test_a_state_that_breaks_a_rule_is_not_written(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(RecordError, match=message):
            CODEC.encode(replace(make_state(0), **{name: one_of(value) for name, value in changes.items()}))

    def test_columns_of_other_lengths_are_not_written(self) -> None:
        with pytest.raises(RecordError, match="it must be a column of 1 rows"):
            CODEC.encode(replace(make_state(0), prompt=["a", "b"]))


def one_of(value: Any) -> Any:
    """A column of one row, unless it is one."""
    return value if isinstance(value, np.ndarray) else [value]
