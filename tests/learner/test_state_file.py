"""Nested states on disk: what comes back is what was saved, to the type and the bit; nothing but data is ever read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddil_dist.errors import CheckpointError
from learner.state_file import load_state, save_state

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner), max_leaves=12
    ),
)


def typed(value: Any) -> Any:
    """The value with its types in the open: 1 == True == 1.0, but not here."""
    if isinstance(value, dict):
        return ["dict", [(typed(key), typed(item)) for key, item in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [typed(item) for item in value]]
    return [type(value).__name__, value]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=STATES)
def test_plain_values_come_back_as_they_were(tmp_path: Path, state: dict[Any, Any]) -> None:
    save_state(tmp_path / "state", state)
    assert typed(load_state(tmp_path / "state")) == typed(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_in_their_dtype_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(12).reshape(3, 4).to(dtype)
    state = {"whole": whole, "part": whole[:, 1], "scalar": whole[2, 3], "empty": whole[:0], "again": whole}
    save_state(tmp_path / "state", {"tensors": [state]})
    (loaded,) = load_state(tmp_path / "state")["tensors"]
    for name, tensor in state.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    numpy, python = np.random.default_rng(3), random.Random(4)
    numpy.integers(0, 10, dtype=np.int32)  # half of a 64-bit draw is kept back
    save_state(tmp_path / "state", {"numpy": numpy.bit_generator.state, "python": python.getstate()})
    state = load_state(tmp_path / "state")
    other, another = np.random.default_rng(5), random.Random(6)
    other.bit_generator.state = state["numpy"]
    another.setstate(state["python"])
    assert numpy.integers(0, 1000, 8, dtype=np.int32).tolist() == other.integers(0, 1000, 8, dtype=np.int32).tolist()
    assert python.random() == another.random()


def test_what_is_no_data_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="holds a PosixPath"):
        save_state(tmp_path / "state", {"path": tmp_path})


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"garbage" * 20)
    with pytest.raises(CheckpointError, match="not a readable state file"):
        load_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match="not a readable state file"):
        load_state(tmp_path / "none")
