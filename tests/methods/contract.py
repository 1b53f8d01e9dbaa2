"""What every method must do, as functions of a problem on the tiny pipeline; a method outside is held to it, too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ddil_dist.config import RunConfig, load_config
from ddil_dist.export import export_student, verify_export
from ddil_dist.launch import inline
from ddil_dist.launch.inline import run_inline
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods import STUDENT, Objective, create_networks, create_objective
from tests.support.problem import draw_states, perturbed
from tests.support.states import train_batch

UPDATES = 5
PROMPTS = ["a red square", "ein grünes Dreieck", ""]


def batch_of(problem: ImitationProblem, num: int) -> States[Tensor]:
    """Arbitrary states of every grid point, with the expert's answers if the method wants them."""
    x_t, index, conditioning, scales = draw_states(problem, num)
    label = None
    if problem.config.objective.uses_labels:
        label = problem.teacher_policy().solve(x_t, index, conditioning, scales)
    nobody = torch.zeros(num, dtype=torch.int64)
    return train_batch(x_t, index, conditioning, scales, label, nobody.to(torch.uint8), nobody - 1, nobody)


def started(problem: ImitationProblem) -> tuple[Objective, dict[str, nn.Module]]:
    """The objective and its networks, none of which answers as another does."""
    torch.manual_seed(0)
    networks = create_networks(problem.config, problem)
    for seed, network in enumerate(networks.values()):
        perturbed(network, seed=seed)
    return create_objective(problem.config, problem, networks), networks


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def check_losses(problem: ImitationProblem) -> None:
    """Every loss is finite, is the mean of what it says of its rows, and trains its own role and no other."""
    objective, networks = started(problem)
    assert networks.keys() == {STUDENT, *problem.config.objective.roles}
    trained = set()
    for update in range(UPDATES):
        for phase in objective.phases(update):
            for network in networks.values():
                network.zero_grad(set_to_none=True)
            for role, network in networks.items():
                network.requires_grad_(role == phase.role)
            output = phase.loss(batch_of(problem, 4))
            output.loss.backward()
            assert output.per_sample.shape == (4,)
            assert torch.isfinite(output.per_sample).all()
            torch.testing.assert_close(output.loss.detach(), output.per_sample.mean(), rtol=1e-4, atol=1e-6)
            moved = {role for role, network in networks.items() if any(g.any() for g in gradients(network).values())}
            assert moved == {phase.role}
            trained.add(phase.role)
        objective.after_update(update)
    assert trained == networks.keys()


def check_rows_are_independent(problem: ImitationProblem) -> None:
    """Two halves of a batch make the gradient of the whole: as micro-batches, and as two workers' averaged shares.

    What a loss draws is drawn by row here, so that a row meets the same noise in a half as in the whole.
    """
    whole, halves = (_gradients_in_parts(problem, parts) for parts in (1, 2))
    assert whole.keys() == halves.keys()
    for role, found in whole.items():
        assert found.keys() == halves[role].keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, halves[role][name], rtol=2e-3, atol=2e-5)


def _gradients_in_parts(problem: ImitationProblem, parts: int) -> dict[str, dict[str, Tensor]]:
    objective, networks = started(problem)
    found = {}
    for phase in objective.phases(0):
        for role, network in networks.items():
            network.requires_grad_(role == phase.role).zero_grad(set_to_none=True)
        size = 4 // parts
        for number, part in enumerate(batch_of(problem, 4).split(size)):
            with draws_by_row(number * size, size):
                (phase.loss(part).loss / parts).backward()
        found[phase.role] = gradients(networks[phase.role])
    return found


@contextmanager
def draws_by_row(first: int, num: int) -> Iterator[None]:
    """The n-th draw of a loss of `num` rows is the same for a row, whichever part of a batch it is in.

    What draws from a generator of its own, such as data, is left alone.
    """
    calls = iter(range(1000))

    def by_row(draw: Any, shape_at: int) -> Any:
        def drawn(*arguments: Any, generator: torch.Generator | None = None, **more: Any) -> Any:
            if generator is not None:
                return draw(*arguments, generator=generator, **more)
            *before, shape = arguments[: shape_at + 1]
            assert shape[0] == num, "a loss draws for all of its rows at once"
            told = torch.Generator().manual_seed(next(calls))
            rows = draw(*before, (8, *shape[1:]), generator=told, **more)
            return rows[first : first + num]

        return drawn

    draws = {"randn": by_row(torch.randn, 0), "rand": by_row(torch.rand, 0), "randint": by_row(torch.randint, 2)}
    with mock.patch.multiple(torch, **draws):
        yield


def check_export(problem: ImitationProblem, path: Path) -> None:
    """Stock diffusers makes of the exported pipeline what the policy makes."""
    weights = perturbed(problem.new_student()).state_dict()
    export_student(problem, weights, path)
    assert verify_export(problem, weights, path, PROMPTS, guidance_scale=4.0, seed=5) < 2e-4


def check_resume(overrides: list[str]) -> None:
    """A run that is stopped half-way and resumed ends with the bytes of one that was not."""
    whole, cut = (
        load_config(None, [*overrides, f"run.name={name}", f"learner.updates={UPDATES}"]) for name in ("whole", "cut")
    )
    assert run_inline(whole)
    with mock.patch.object(inline, "stop_on_signals", _stop_after(3)):
        assert not run_inline(cut)
    torch.manual_seed(11)  # what the process drew before must not matter
    assert run_inline(cut)
    assert _weights_digests(cut) == _weights_digests(whole)


def _stop_after(updates: int) -> Any:
    class Stop:
        left = updates

        def is_set(self) -> bool:
            self.left -= 1
            return self.left == -1

    @contextmanager
    def stop() -> Iterator[Stop]:
        yield Stop()

    return stop


def _weights_digests(config: RunConfig) -> Mapping[str, str]:
    manifest = config.run.path / "checkpoints" / f"update_{UPDATES:08d}" / "manifest.json"
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    weights = {
        name: entry["digest"] for name, entry in files.items() if name.split(".")[0] not in ("with_surroundings",)
    }
    assert {"student.safetensors", "average.safetensors"} <= weights.keys()
    return weights
