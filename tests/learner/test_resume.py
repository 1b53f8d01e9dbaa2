"""Checkpoints: a resumed run is the uninterrupted one, and damage is told."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddil_dist.errors import CheckpointError, EnvironmentFailure
from ddil_dist.weights import InMemoryWeightStore
from learner import checkpoint
from learner.checkpoint import CheckpointStore
from learner.trainer import Trainer
from learner.update_record import UpdateRecord
from tests.learner.support import SeededSource, learner_config, make_trainer


def run(directory: Path, *, stop_at: int | None = None, **options: Any) -> tuple[Trainer, list[UpdateRecord], bool]:
    records: list[UpdateRecord] = []
    trainer = make_trainer(directory, on_update=records.append, **options)
    finished = trainer.run(should_stop=lambda: trainer.update == stop_at)
    return trainer, records, finished


def exported(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.final_weights().items()}


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, stop_at: int) -> None:
    whole, all_records, _ = run(tmp_path / "whole")
    _, before, finished = run(tmp_path / "cut", stop_at=stop_at)
    assert finished is False
    resumed, after, finished = run(tmp_path / "cut", source=SeededSource(seed=99))  # its own seed must not matter
    assert finished is True
    assert [record.update for record in (*before, *after)] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(all_records, [*before, *after], strict=True):
        assert (one.loss, one.grad_norm, one.learning_rate) == (other.loss, other.grad_norm, other.learning_rate)
    assert exported(resumed) == exported(whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(record: UpdateRecord) -> None:
        if record.update == 5:
            raise KilledError

    whole, _, _ = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        make_trainer(tmp_path / "cut", on_update=kill).run()
    resumed, records, _ = run(tmp_path / "cut")
    assert [record.update for record in records] == [5, 6]
    assert exported(resumed) == exported(whole)


def test_a_run_that_is_stopped_before_its_first_update_leaves_a_checkpoint(tmp_path: Path) -> None:
    whole, all_records, _ = run(tmp_path / "whole")
    trainer = make_trainer(tmp_path / "cut")
    assert trainer.run(should_stop=lambda: True) is False
    assert CheckpointStore(tmp_path / "cut" / "checkpoints", keep=2).newest_update() == 0
    resumed, records, _ = run(tmp_path / "cut")
    assert [record.loss for record in records] == [record.loss for record in all_records]
    assert exported(resumed) == exported(whole)


def test_torchs_own_randomness_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run(tmp_path, stop_at=2)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    make_trainer(tmp_path)
    assert torch.equal(torch.rand(3), wanted)


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    first, _, _ = run(tmp_path)
    again, records, finished = run(tmp_path)
    assert finished is True
    assert records == []
    assert exported(again) == exported(first)


def test_a_resumed_learner_publishes_again_to_an_empty_store_but_never_an_old_version(tmp_path: Path) -> None:
    store = InMemoryWeightStore()
    run(tmp_path, stop_at=3, weights=store)
    newest = store.newest()
    assert newest is not None
    assert newest.version == 2
    versions: list[int] = []
    fresh = InMemoryWeightStore()
    run(tmp_path, weights=fresh, on_publish=lambda version: versions.append(version.version))
    assert versions == [3, 4, 6]


def test_a_store_ahead_of_the_checkpoint_is_not_written_backwards(tmp_path: Path) -> None:
    store = InMemoryWeightStore()
    run(tmp_path, weights=store)
    shutil.rmtree(tmp_path / "checkpoints" / "update_00000006")  # it published 6, and died before its checkpoint
    versions: list[int] = []
    run(tmp_path, weights=store, on_publish=lambda version: versions.append(version.version))
    newest = store.newest()
    assert versions == []
    assert newest is not None
    assert newest.version == 6


def test_the_newest_few_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, config=learner_config(checkpoint_every=1, keep_checkpoints=2))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["update_00000005", "update_00000006"]


def test_a_staged_checkpoint_that_was_not_committed_is_ignored(tmp_path: Path) -> None:
    whole, _, _ = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_at=2)
    store = CheckpointStore(tmp_path / "cut" / "checkpoints", keep=2)
    staged = store._stage(4)
    (staged / "trainer.safetensors").write_bytes(b"half a file")
    newest = store.newest()
    assert newest is not None
    assert newest.name == "update_00000002"
    resumed, _, _ = run(tmp_path / "cut")
    assert exported(resumed) == exported(whole)
    assert not staged.exists(), "the next checkpoint of that update took its place"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(b"garbage" * 50),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one bit": flip,
}
FILES = ["trainer.safetensors", "student.safetensors", "average.safetensors", "worker_0.safetensors", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _, _ = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_at=4)
    checkpoints = tmp_path / "cut" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["update_00000002", "update_00000004"]
    DAMAGE[damage](checkpoints / "update_00000004" / name)
    resumed, records, _ = run(tmp_path / "cut")
    assert [record.update for record in records] == [3, 4, 5, 6]
    assert exported(resumed) == exported(whole)
    assert re.search(rf"update_00000004 is damaged: .*{name}.*; set aside", caplog.text)
    assert (checkpoints / "update_00000004.damaged").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    run(tmp_path, stop_at=4)
    for path in (tmp_path / "checkpoints").iterdir():
        flip(path / "student.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*update_00000002.damaged, update_00000004"):
            make_trainer(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "student.safetensors"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, stop_at=4)
    original = Path.open

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return original(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", failing)
        with pytest.raises(EnvironmentFailure, match=rf"update_00000004.*{name}.*{os.strerror(number)}.*storage"):
            make_trainer(tmp_path)
    assert make_trainer(tmp_path).update == 4


def test_a_checkpoint_that_is_pruned_while_it_is_looked_at_gives_way_to_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, stop_at=4)
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    look = checkpoint.find_damage

    def pruned(path: Path) -> str:
        monkeypatch.setattr(checkpoint, "find_damage", look)
        for update in (2, 4):
            store.path(update).rename(store.path(update + 4))
        return look(path)

    monkeypatch.setattr(checkpoint, "find_damage", pruned)
    assert store.newest_whole() == store.path(8)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["update_00000006", "update_00000008"]


def test_asking_whether_a_checkpoint_is_whole_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, stop_at=4)
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    flip(store.path(4) / "student.safetensors")
    assert [store.is_whole(update) for update in (2, 4, 6)] == [True, False, False]
    assert store.updates() == [2, 4]


def test_what_a_killed_attempt_left_is_not_reused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    (store._stage(3) / "worker_7.safetensors").write_bytes(b"of another attempt")
    (store._stage(7) / "worker_7.safetensors").write_bytes(b"of another attempt")
    staged = store._stage(7)
    assert list(staged.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["update_00000007.partial"]


def test_a_checkpoint_of_another_network_is_told(tmp_path: Path) -> None:
    run(tmp_path, stop_at=2)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the average .*another run\.name"):
        make_trainer(tmp_path, network=OtherNetwork())


class OtherNetwork(torch.nn.Linear):
    """Of other parameters."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.config = {"time_cond_proj_dim": 8}


def test_a_checkpoint_past_the_end_is_told(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"update 6, past learner\.updates=4"):
        make_trainer(tmp_path, config=learner_config(updates=4))


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    run(tmp_path)
    _, records, finished = run(tmp_path, config=learner_config(updates=8))
    assert finished
    assert [record.update for record in records] == [7, 8]


def test_a_commit_replaces_a_checkpoint_of_the_same_update(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for value in (1.0, 2.0):
        path = store.write(7, {"student": partial(dict, w=torch.tensor(value))})
    assert load_file(path / "student.safetensors") == {"w": torch.tensor(2.0)}
    assert [found.name for found in tmp_path.iterdir()] == ["update_00000007"]
    assert store.newest() == path
    assert CheckpointStore(tmp_path / "none", keep=2).newest() is None


def test_a_generators_whole_state_survives(tmp_path: Path) -> None:
    # Its 128-bit integers and the half-used 32-bit draw.
    source = SeededSource()
    source._generator.integers(0, 10, dtype=np.int32)
    trainer = make_trainer(tmp_path, source=source, config=learner_config(updates=1))
    trainer.run()
    restored = SeededSource(seed=5)
    make_trainer(tmp_path, source=restored, config=learner_config(updates=1))
    assert restored.state_dict() == source.state_dict()
