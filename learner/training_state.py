"""Everything that a run has to go on from: what is in a checkpoint, how it is written, how it is taken up again.

<role>.safetensors        each role's weights
average.safetensors       the student's weights, averaged, where an average is kept
objective_<name>.safetensors
                          the objective's own networks
trainer.safetensors       optimizers, loss scaler, counters
worker_<rank>.safetensors each worker's data order and random states
with_<name>.safetensors   what else belongs to the run, such as the replay buffer of a run in one process
manifest.json             a digest of each file
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather
from safetensors.torch import load, save
from torch import Tensor

from ddil_dist.errors import CheckpointError
from learner.checkpoint import CheckpointStore, averaged_weights, load_weights
from learner.checkpoint_writer import CheckpointWriter
from learner.ema import Ema
from learner.methods import Objective
from learner.roles import Role
from learner.state_file import at_rest, encode_state, load_state


class Stateful(Protocol):
    """What can be taken up again from plain data."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingState:
    """The parts of a training run, saved and resumed together. Every worker makes every call."""

    def __init__(
        self,
        store: CheckpointStore,
        writer: CheckpointWriter,
        *,
        accelerator: Accelerator,
        roles: Mapping[str, Role],
        average: Ema,
        objective: Objective,
        source: Stateful,
        companions: Mapping[str, Stateful],
    ) -> None:
        self._store = store
        self._writer = writer
        self._accelerator = accelerator
        self._roles = roles
        self._average = average
        self._objective = objective
        self._source = source
        self._companions = companions

    def save(self, update: int, *, source: Mapping[str, Any]) -> None:
        """Write a checkpoint after this many updates; source: the state of this worker's, as of then.

        What is trained may change as soon as this returns; the writer knows when the checkpoint is on the disk.
        """
        own = encode_state({"source": source, "random": random_state()})
        workers = _gather_files(self._accelerator, own)
        weights = {name: role.weights() for name, role in self._roles.items()}
        if self._average.is_kept:
            weights["average"] = self._average.weights()
        optimizers = {name: role.optimizer_state() for name, role in self._roles.items()}
        if not self._accelerator.is_main_process:
            return
        for name, network in self._objective.state.items():
            weights[f"objective_{name}"] = network.state_dict()
        scaler = self._accelerator.scaler
        trainer = {
            "update": update,
            "num_averaged": self._average.num_averaged,
            "optimizers": optimizers,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        parts: dict[str, Callable[[], Mapping[str, Tensor]]] = {}
        parts |= {name: partial(_at_rest, state) for name, state in weights.items()}
        parts |= {f"with_{name}": partial(_of_companion, companion) for name, companion in self._companions.items()}
        parts |= {"trainer": partial(encode_state, trainer)}
        parts |= {f"worker_{rank}": partial(load, data) for rank, data in enumerate(workers)}
        size_bytes = sum(tensor.numel() * tensor.itemsize for tensor in _tensors([weights, optimizers]))
        self._writer.write(update, parts, size_bytes=size_bytes)

    def resume(self, *, updates: int) -> int:
        """Take up the newest whole checkpoint; the number of updates that it was written after, 0 if there is none.

        Raises CheckpointError if it is past `updates`, of other networks, or if none is whole.
        """
        path = self._agree_on_a_checkpoint()
        if path is None:
            return 0
        trainer = load_state(path / "trainer.safetensors")
        if trainer["update"] > updates:
            raise CheckpointError(
                f"{path}: was written at update {trainer['update']}, past learner.updates={updates}; "
                "raise learner.updates, or choose another run.name"
            )
        average = partial(self._average.load, num_averaged=trainer["num_averaged"])
        load_weights(averaged_weights(path), average)
        for name, role in self._roles.items():
            load_weights(path / f"{name}.safetensors", role.load_weights)
            role.load_optimizer_state(trainer["optimizers"][name])
        for name, network in self._objective.state.items():
            load_weights(path / f"objective_{name}.safetensors", network.load_state_dict)
        if self._accelerator.scaler is not None and trainer["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(trainer["scaler"])
        if self._accelerator.is_main_process:
            for name, companion in self._companions.items():
                beside = path / f"with_{name}.safetensors"
                if beside.is_file():  # a run that was in several processes before has none
                    companion.load_state_dict(load_state(beside))
        worker = path / f"worker_{self._accelerator.process_index}.safetensors"
        if worker.is_file():  # a run resumed on more workers than it had: the new ones begin with fresh generators
            own = load_state(worker)
            self._source.load_state_dict(own["source"])
            set_random_state(own["random"])
        return int(trainer["update"])

    def _agree_on_a_checkpoint(self) -> Path | None:
        """The main process's choice, so that no two workers take up different ones."""
        found = self._store.newest_whole() if self._accelerator.is_main_process else None
        update = -1 if found is None else int(found.name.removeprefix("update_"))
        if self._accelerator.num_processes > 1:
            update = int(broadcast(torch.tensor([update], device=self._accelerator.device)).item())
        return None if update < 0 else self._store.path(update)


def seed_random(seed: int) -> None:
    """Seed every global random generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every global random generator of this process."""
    kind, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on from what `random_state` returned; GPUs that were not there then keep theirs."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, own in enumerate(state["cuda"][:num_gpus]):
        torch.cuda.set_rng_state(own, index)


def _at_rest(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: at_rest(tensor) for name, tensor in weights.items()}


def _of_companion(companion: Stateful) -> dict[str, Tensor]:
    return encode_state(companion.state_dict())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _gather_files(accelerator: Accelerator, tensors: dict[str, Tensor]) -> list[bytes]:
    """The small file that each worker would write, so that rank 0 writes all of them. Every worker calls."""
    own = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
    if accelerator.num_processes == 1:
        return [own.numpy().tobytes()]
    sizes = gather(torch.tensor([len(own)], device=accelerator.device)).tolist()
    padded = torch.zeros(1, max(sizes), dtype=torch.uint8)
    padded[0, : len(own)] = own
    rows = gather(padded.to(accelerator.device)).cpu().numpy()
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
