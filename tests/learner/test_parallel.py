"""Two workers of half a batch each make the updates of one worker with the whole, in real processes over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def launch(directory: Path, rank: int, world: int, port: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if world == 1:
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del environment[key]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.learner.group", str(directory)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The directories that a world of one worker and a world of two left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directories = {world: tmp_path_factory.mktemp(f"world{world}") for world in (1, 2)}
    processes = [launch(path, rank, world, port) for world, path in directories.items() for rank in range(world)]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return directories


def lines(directory: Path, name: str, rank: int = 0) -> Any:
    return json.loads((directory / f"{name}-{rank}.json").read_text())


def close(one: Any, other: Any) -> None:
    """Equal to rounding, down to the numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    else:
        assert one == pytest.approx(other, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize(
    "name", ["whole", "micro", "narrow", "phases", "late", "resumed", "starved", "sharded", "alike", "judged"]
)
def test_two_workers_make_the_updates_of_one(groups: dict[int, Path], name: str) -> None:
    alone, together = lines(groups[1], name), lines(groups[2], name)
    assert len(alone) == len(together) == 4
    for one, other in zip(alone, together, strict=True):
        close(one, other)
    wanted = load_file(groups[1] / f"{name}-0.safetensors")
    found = load_file(groups[2] / f"{name}-0.safetensors")
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        # AdamW divides a gradient by its own size: where it is nothing but rounding, that shows.
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=3e-5)


def test_networks_that_are_shared_in_half_precision_learn_what_whole_ones_do(groups: dict[int, Path]) -> None:
    name = "judged in half precision"
    alone, together = lines(groups[1], name), lines(groups[2], name)
    assert len(alone) == len(together) == 4
    for one, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.03)
    assert together != alone


@pytest.mark.parametrize("name", ["whole", "micro", "narrow", "phases", "late"])
def test_the_workers_agree_to_the_bit(groups: dict[int, Path], name: str) -> None:
    assert lines(groups[2], name, 0) == lines(groups[2], name, 1)
    one, other = (load_file(groups[2] / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_stop_while_a_worker_waits_costs_no_batch(groups: dict[int, Path]) -> None:
    for directory in groups.values():
        for one, other in zip(lines(directory, "starved"), lines(directory, "whole"), strict=True):
            close(one, other)


def test_training_moved_the_weights(groups: dict[int, Path]) -> None:
    micro, whole = (load_file(groups[1] / f"{name}-0.safetensors") for name in ("micro", "whole"))
    start = load_file(groups[1] / "whole" / "checkpoints" / "update_00000002" / "student.safetensors")
    moved = max(float((whole[key] - tensor).abs().max()) for key, tensor in start.items())
    assert moved > 1e-3, "far more than what the comparisons let pass"
    assert micro.keys() == whole.keys()


def test_every_worker_hears_that_one_diverged(groups: dict[int, Path]) -> None:
    for rank in (0, 1):
        assert "update 1: 1 of 12 losses of the student are not finite" in lines(groups[2], "diverging", rank)


def test_a_checkpoint_of_a_sharded_run_is_that_of_any_other(groups: dict[int, Path]) -> None:
    whole, sharded = (groups[2] / name / "checkpoints" / "update_00000004" for name in ("resumed", "sharded"))
    assert sorted(path.name for path in sharded.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in ("student.safetensors", "average.safetensors"):
        ours, theirs = load_file(sharded / name), load_file(whole / name)
        assert {key: tensor.shape for key, tensor in ours.items()} == {k: v.shape for k, v in theirs.items()}
