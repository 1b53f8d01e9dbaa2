"""States in columns: rows are chosen, joined and moved whole, and latents at rest are the tensor's in every dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ddil_dist.models.conditioning import Conditioning
from ddil_dist.states import States, at_rest, to_tensor
from tests.replay.support import make_states
from tests.support.states import rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_latents_come_back_as_they_were_and_share_no_memory(dtype: str) -> None:
    batch = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    wanted = batch.clone().to(getattr(torch, dtype))
    rest = at_rest(batch[:, :, :, :1].transpose(2, 3), dtype)
    batch.zero_()
    assert rest.nbytes == wanted[:, :, :, :1].nbytes
    assert torch.equal(to_tensor(rest), wanted[:, :, :, :1].transpose(2, 3))


def told(states: States[Any]) -> list[tuple[int, str, float]]:
    return [(row.trajectory_id, row.prompt, float(row.x_t[0, 0, 0])) for row in rows(states)]


def test_rows_stay_whole_through_splits_and_joins() -> None:
    states = make_states(0, 7, labelled=True)
    parts = states.split(3)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert told(States.join(parts)) == told(states)
    assert told(states.rows([5, 1])) == [(5, "state 5", 5.0), (1, "state 1", 1.0)]
    assert states.split(7) == [states]


def test_a_join_has_answers_only_where_every_part_has_them() -> None:
    with_, without = make_states(0, 2, labelled=True), make_states(2, 3)
    both = States.join([with_, with_]).label
    assert both is not None
    assert len(both) == 4
    assert States.join([with_, without]).label is None


def test_tensors_are_the_columns_with_latents_in_float32() -> None:
    states = make_states(0, 3, x_t=at_rest(torch.full((1, 4, 2, 2), 1.5), "bfloat16"))
    batch = replace(states.tensors(CPU), conditioning=Conditioning(torch.arange(3).view(3, 1, 1).float()))
    assert batch.x_t.dtype == torch.float32
    assert torch.equal(batch.x_t, torch.full((3, 4, 2, 2), 1.5))
    assert batch.trajectory_id.tolist() == [0, 1, 2]
    assert batch.prompt == states.prompt
    one, two = batch.split(2)
    assert two.conditioning.embeddings.flatten().tolist() == [2.0]
    assert torch.equal(States.join([two, one]).conditioning.embeddings.flatten(), torch.tensor([2.0, 0.0, 1.0]))
