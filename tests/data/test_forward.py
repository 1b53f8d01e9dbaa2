"""The stream of encoded images: seeded, every row once an epoch, resumable at any position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ddil_dist.data import row_groups
from ddil_dist.data.forward import ForwardData
from ddil_dist.data.rows import ShuffledRows
from ddil_dist.problem import ImitationProblem
from tests.data.support import encoded, write_rows
from tests.support.problem import tiny_problem

NUM = 7


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> ImitationProblem:
    path = tmp_path_factory.mktemp("forward") / "d.parquet"
    write_rows(path, [(encoded((30 * i, 255 - 30 * i, 40)), f"row {i}") for i in range(NUM)])
    return tiny_problem(tiny_directory, f"data.path={path}")


def stream(problem: ImitationProblem, *, seed: int = 3, encode_batch: int = 4) -> ForwardData:
    rows = ShuffledRows(problem.open_data(), problem.teacher, seed=seed)
    return ForwardData(rows, problem.teacher, seed=seed, encode_batch=encode_batch)


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(problem: ImitationProblem) -> None:
    forward = stream(problem)
    epochs = [forward.next(NUM)[1] for _ in range(4)]
    assert all(sorted(epoch) == [f"row {i}" for i in range(NUM)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_order_and_posterior_noise(problem: ImitationProblem) -> None:
    latents, captions = stream(problem).next(20)
    same_latents, same_captions = stream(problem).next(20)
    assert captions == same_captions
    assert torch.equal(latents, same_latents)
    other_latents, other_captions = stream(problem, seed=4).next(20)
    assert captions != other_captions
    # The same row of two epochs has the same mean and other noise.
    first, second = (i for i, caption in enumerate(captions[:14]) if caption == "row 0")
    assert not torch.equal(latents[first], latents[second])
    assert not torch.equal(latents, other_latents)


def test_a_latent_belongs_to_its_caption(problem: ImitationProblem) -> None:
    latents, captions = stream(problem).next(NUM)
    data, vae = problem.open_data(), problem.teacher.pipeline.vae
    for latent, caption in zip(latents, captions, strict=True):
        image, _ = data.images([int(caption.removeprefix("row "))])
        with torch.no_grad():
            posterior = vae.encode(image).latent_dist
        noise = (latent / vae.config.scaling_factor - posterior.mean[0]) / posterior.std[0]
        assert noise.abs().max() < 5
        assert 0.6 < noise.std() < 1.4


@pytest.mark.parametrize("position", range(23))
def test_a_resumed_stream_goes_on_exactly(problem: ImitationProblem, position: int) -> None:
    whole_latents, whole_captions = stream(problem).next(30)
    before = stream(problem)
    if position:
        before.next(position)
    state = before.state_dict()
    resumed = stream(problem)
    resumed.next(5)  # wherever it stood
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    latents, captions = resumed.next(30 - position)
    assert captions == whole_captions[position:]
    assert torch.equal(latents, whole_latents[position:])


@pytest.fixture
def in_groups(tmp_path: Path, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ImitationProblem]:
    """Opens the problem of 30 rows in groups of 3, of which at most four are kept."""
    rows = [(encoded((8 * i, 255 - 8 * i, 40)), f"row {i}") for i in range(30)]
    write_rows(tmp_path / "d.parquet", rows, group=3)
    monkeypatch.setattr(row_groups, "CACHE_BYTES", 12 * (max(len(image) for image, _ in rows) + 40))
    return lambda: tiny_problem(tiny_directory, f"data.path={tmp_path / 'd.parquet'}")


@pytest.mark.parametrize("position", [1, 14, 30, 44, 59])
def test_a_stream_of_data_larger_than_memory_goes_on_exactly(
    in_groups: Callable[[], ImitationProblem], position: int
) -> None:
    latents, captions = stream(in_groups()).next(75)
    assert captions[:30] != [f"row {i}" for i in np.random.default_rng((3, 2, 0)).permutation(30)], "a local order"
    for first in (0, 30):
        assert sorted(captions[first : first + 30]) == sorted(f"row {i}" for i in range(30))
    before = stream(in_groups())
    before.next(position)
    resumed = stream(in_groups())
    resumed.load_state_dict(before.state_dict())
    found, told = resumed.next(75 - position)
    assert told == captions[position:]
    assert torch.equal(found, latents[position:])


def test_the_data_is_opened_once(in_groups: Callable[[], ImitationProblem]) -> None:
    problem = in_groups()
    opened = [problem.forward_data(seed=seed)._rows for seed in (1, 2)]
    assert all(isinstance(rows, ShuffledRows) and rows._data is problem.open_data() for rows in opened)
    assert len(problem.prompts()) == 30


def test_how_many_are_asked_for_at_a_time_does_not_matter(problem: ImitationProblem) -> None:
    whole_latents, whole_captions = stream(problem).next(24)
    forward = stream(problem)
    parts = [forward.next(num) for num in (1, 2, 9, 5, 7)]
    assert [caption for _, captions in parts for caption in captions] == whole_captions
    assert torch.equal(torch.cat([latents for latents, _ in parts]), whole_latents)
