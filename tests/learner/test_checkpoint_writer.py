"""Checkpoints off the training thread: copies, one at a time, and disks that are slow, full or silent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddil_dist.errors import CheckpointError
from ddil_dist.journal import Journal, read_journal
from learner import checkpoint_writer
from learner.checkpoint import CheckpointStore, Parts, find_damage
from learner.checkpoint_writer import CheckpointWriter, free_host_memory
from learner.tensor_file import CHUNK_BYTES, DTYPES, write_tensors
from tests.learner.support import learner_config, make_trainer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    tensors = {
        "matrix": values.view(torch.bool) if dtype == torch.bool else values.to(dtype),
        "one": torch.ones((), dtype=torch.float32).to(dtype),
        "none": torch.zeros(0, 5, dtype=torch.float32).to(dtype),
        "wider": torch.tensor([1.5], dtype=torch.float64),
        "narrower": torch.tensor([7], dtype=torch.uint8),
    }
    if dtype == torch.bool:
        tensors["matrix"] = values % 2 == 0
    told: list[int] = []
    written = write_tensors(tmp_path / "file", tensors, on_bytes=told.append)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
    content = (tmp_path / "file").read_bytes()
    assert written.size_bytes == len(content) == sum(told)
    assert written.digest == hashlib.blake2b(content, digest_size=16).hexdigest()


class SlowDisk(CheckpointStore):
    """Takes a byte of a checkpoint and goes on when it is let."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, keep=9)
        self.go = threading.Event()
        self.begun = threading.Event()

    def write(self, update: int, parts: Parts, *, on_bytes: Callable[[int], None] = lambda num: None) -> Path:
        on_bytes(1)
        self.begun.set()
        assert self.go.wait(30)
        return super().write(update, parts, on_bytes=on_bytes)


class FullDisk(CheckpointStore):
    """Has room for nothing while it is full."""

    full = True

    def _commit(self, update: int, files: Mapping[str, Any]) -> Path:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super()._commit(update, files)


def parts_of(tensor: Tensor) -> Parts:
    return {"student": lambda: {"w": tensor.clone()}}


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    store = SlowDisk(tmp_path / "checkpoints")
    journal = Journal(tmp_path / "journal")
    told: list[tuple[int, int, int]] = []
    writer = CheckpointWriter(
        store, background=True, journal=journal, on_progress=lambda *numbers: told.append(numbers)
    )
    weights = torch.ones(3)
    writer.write(5, parts_of(weights), size_bytes=12)
    weights.zero_()
    assert writer.is_busy
    assert store.updates() == []
    assert store.begun.wait(30)
    threading.Timer(2 * checkpoint_writer.LOOK_S, store.go.set).start()
    writer.settle()
    assert not writer.is_busy
    assert load_file(store.path(5) / "student.safetensors")["w"].tolist() == [1.0, 1.0, 1.0]
    assert find_damage(store.path(5)) == ""
    assert told[0] == (5, 1, 12)
    (line,) = read_journal(tmp_path / "journal")
    assert (line["kind"], line["update"]) == ("checkpoint", 5)
    assert line["size_bytes"] > 12
    assert 0 <= line["held_s"] <= line["seconds"]


def test_a_checkpoint_does_not_wait_for_whoever_is_told_of_it(tmp_path: Path) -> None:
    waiting = threading.current_thread()
    store = SlowDisk(tmp_path)
    told: list[threading.Thread] = []
    writer = CheckpointWriter(
        store, background=True, on_progress=lambda *numbers: told.append(threading.current_thread())
    )
    writer.write(5, parts_of(torch.ones(3)), size_bytes=12)
    threading.Timer(2 * checkpoint_writer.LOOK_S, store.go.set).start()
    writer.settle()
    assert set(told) == {waiting}


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_comes_when_the_disk_is_free(
    tmp_path: Path,
) -> None:
    store = SlowDisk(tmp_path / "checkpoints")
    trainer = make_trainer(tmp_path, config=learner_config(updates=9))
    trainer._writer = trainer._state._writer = CheckpointWriter(store, background=True)
    for _ in range(7):
        trainer._step()
    assert store.begun.is_set()
    assert store.updates() == []
    store.go.set()
    trainer._writer.settle()
    assert store.updates() == [2]
    assert trainer.run()
    assert store.updates()[:2] == [2, 7]
    assert store.updates()[-1] == 9
    assert all(find_damage(store.path(update)) == "" for update in store.updates())


def test_a_full_disk_costs_checkpoints_and_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FullDisk(tmp_path / "checkpoints", keep=9)
    trainer = make_trainer(tmp_path)
    trainer._writer = trainer._state._writer = CheckpointWriter(store, background=True)
    for _ in range(4):
        trainer._step()
        trainer._writer.close()
    assert store.updates() == []
    assert not list((tmp_path / "checkpoints").iterdir()), "nothing is left of it"
    assert "update_00000002: cannot be written ([Errno 28] No space left on device)" in caplog.text
    store.full = False
    assert trainer.run()
    assert store.updates() == [4, 6]


@pytest.mark.parametrize("background", [True, False])
def test_a_last_checkpoint_that_cannot_be_written_is_a_failure(tmp_path: Path, background: bool) -> None:
    store = FullDisk(tmp_path / "checkpoints", keep=9)
    trainer = make_trainer(tmp_path)
    trainer._writer = trainer._state._writer = CheckpointWriter(store, background=background)
    with pytest.raises(CheckpointError, match=r"update_00000006: cannot be written .*No space left.*run again"):
        trainer.run()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_stop_waits_for_the_disk_while_it_takes_anything(tmp_path: Path) -> None:
    store = SlowDisk(tmp_path / "checkpoints")
    writer = CheckpointWriter(store, background=True, silent_s=0.2)
    writer.write(5, parts_of(torch.ones(3)), size_bytes=12)
    assert store.begun.wait(30)
    taking = threading.Event()

    def take() -> None:
        for _ in range(4):
            writer._written += 1
            time.sleep(0.4)
        store.go.set()
        taking.set()

    helper = threading.Thread(target=take)
    helper.start()
    writer.settle()
    assert taking.wait(30), "it waited for far longer than the disk may be silent"
    assert store.updates() == [5]
    store.go.clear()
    writer.write(6, parts_of(torch.ones(3)), size_bytes=12)
    with pytest.raises(
        CheckpointError, match=r"has taken no byte of a checkpoint for 0.2 s \(deadlines.learner_stop_s"
    ):
        writer.settle()
    store.go.set()
    assert writer._thread is not None
    writer._thread.join(30)


def test_without_memory_for_a_copy_parts_are_copied_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "free_host_memory", lambda: 1000)
    store = CheckpointStore(tmp_path, keep=2)
    writer = CheckpointWriter(store, background=True)
    files: list[int] = []

    def part() -> dict[str, Tensor]:
        files.append(len(list(store._staged(5).iterdir())))
        return {"w": torch.ones(300)}

    writer.write(5, {"one": part, "two": part}, size_bytes=2400)
    assert files == [0, 1], "the first was written before the second was made"
    assert store.updates() == [5]


def test_the_hosts_memory_is_the_containers(tmp_path: Path) -> None:
    for folder in ("proc", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16 kB\nMemAvailable: 8 kB\n")
    assert free_host_memory(tmp_path) == 8192
    group = tmp_path / "sys/fs/cgroup"
    (group / "memory.max").write_text("max\n")
    assert free_host_memory(tmp_path) == 8192
    (group / "memory.max").write_text("6000\n")
    (group / "memory.current").write_text("5000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 3000\n")
    assert free_host_memory(tmp_path) == 4000
    assert free_host_memory(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_the_student_is_stored_once_where_no_average_is_kept(tmp_path: Path, decay: float) -> None:
    trainer = make_trainer(tmp_path, config=learner_config(ema_decay=decay))
    trainer.run()
    manifest = json.loads((tmp_path / "checkpoints" / "update_00000006" / "manifest.json").read_text())
    assert ("average.safetensors" in manifest["files"]) is (decay > 0)
    resumed = make_trainer(tmp_path, config=learner_config(ema_decay=decay))
    for name, value in trainer.final_weights().items():
        assert torch.equal(resumed.final_weights()[name], value)


def test_a_file_is_hashed_as_it_is_written_and_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    opened: list[str] = []
    original = Path.open

    def noting(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened.append(mode)
        return original(path, mode, *arguments, **options)

    tensor = torch.arange(CHUNK_BYTES // 4 + 5, dtype=torch.float32)  # a little more than a piece
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", noting)
        store.write(1, {"student": partial(dict, w=tensor)})
    assert not [mode for mode in opened if "r" in mode]
    assert find_damage(store.path(1)) == ""
