"""Compiled networks make the same updates, and leave the same files behind."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from torch import nn

from ddil_dist.config import load_config
from ddil_dist.errors import ConfigError
from ddil_dist.launch.inline import run_inline
from learner.compilation import compile_in_place
from learner.trainer import Trainer
from learner.update_record import UpdateRecord
from tests.learner.group import network
from tests.learner.support import learner_config, make_trainer

pytestmark = pytest.mark.filterwarnings("default")  # compiling imports parts of torch that are deprecated


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Nothing compiled or counted before or after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced, differentiated and cached as ever, but run by torch's own kernels: seconds, not minutes."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(_without_kernels, nn.Module.compile))


def _without_kernels(module: nn.Module, original: Any, **options: Any) -> None:
    original(module, backend="aot_eager")


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def trained(directory: Path, mode: str, *, stop_at: int | None = None) -> tuple[Trainer, list[UpdateRecord]]:
    """Six rows an update in micro-batches of four and two, which are recomputed in the backward pass."""
    records: list[UpdateRecord] = []
    config = learner_config(compile=mode, gradient_checkpointing=True).model_copy(update={"micro_batch_size": 4})
    trainer = make_trainer(directory, network=network(), config=config, on_update=records.append)
    trainer.run(should_stop=lambda: trainer.update == stop_at)
    return trainer, records


def same(ours: list[UpdateRecord], theirs: list[UpdateRecord]) -> None:
    """The same updates to rounding: losses, and norms of gradients, which no optimizer hides."""
    assert [record.update for record in ours] == [record.update for record in theirs]
    assert [record.loss for record in ours] == pytest.approx([record.loss for record in theirs], rel=1e-4)
    assert [record.grad_norm for record in ours] == pytest.approx([record.grad_norm for record in theirs], rel=1e-3)


def names(directory: Path) -> dict[str, list[str]]:
    """The tensors in each file of the last checkpoint."""
    found = {}
    for file in sorted(max((directory / "checkpoints").iterdir()).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found[file.name] = sorted(opened.keys())
    return found


@pytest.mark.usefixtures("no_kernels")
def test_compiled_updates_are_the_same_and_either_run_resumes_the_other(tmp_path: Path) -> None:
    plain, wanted = trained(tmp_path / "plain", "no")
    assert num_graphs() == 0
    compiled, found = trained(tmp_path / "compiled", "default")
    assert num_graphs() == 2, "one for four rows, and one for any other number"
    same(found, wanted)
    assert names(tmp_path / "compiled") == names(tmp_path / "plain")
    assert compiled.final_weights().keys() == plain.final_weights().keys() == network().state_dict().keys()
    for first, then in (("default", "no"), ("no", "default")):
        directory = tmp_path / f"{first}-{then}"
        _, before = trained(directory, first, stop_at=3)
        resumed, after = trained(directory, then)
        same([*before, *after], wanted)
        for name, tensor in resumed.final_weights().items():
            torch.testing.assert_close(tensor, plain.final_weights()[name], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("no_kernels")
def test_neither_pictures_nor_the_estimate_of_memory_compile_anything(tiny_overrides: list[str]) -> None:
    written = {}
    for mode in ("no", "default"):
        config = load_config(
            None, [*tiny_overrides, f"run.name={mode}-mode", f"learner.compile={mode}", "learner.sample_every=2"]
        )
        assert run_inline(config)
        written[mode] = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
        assert len(list((config.run.path / "progress").glob("*.png"))) == 3
        AcceleratorState._reset_state(reset_partial_state=True)
    assert num_graphs() == 1
    (plain,), (compiled,) = (
        [line["activations_bytes"] for line in lines if line["kind"] == "memory"] for lines in written.values()
    )
    assert compiled == plain > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
@pytest.mark.timeout(900)
def test_with_compiled_kernels_updates_are_the_same(tmp_path: Path) -> None:
    _, wanted = trained(tmp_path / "plain", "no")
    compiled, found = trained(tmp_path / "compiled", "default", stop_at=3)
    assert num_graphs() == 2
    same(found, wanted[:3])
    resumed, rest = trained(tmp_path / "compiled", "default")
    same(rest, wanted[3:])
    assert resumed.final_weights().keys() == compiled.final_weights().keys()


def test_compiling_wants_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"learner\.compile: 'default' .* no no-such-compiler on this worker's .*CXX"):
        compile_in_place(nn.Linear(1, 1), mode="default")


def test_a_network_is_itself_unless_asked_otherwise() -> None:
    plain = nn.Linear(1, 1)
    compile_in_place(plain, mode="no")
    assert plain._compiled_call_impl is None
