"""Faster networks roll out the same states, and say where they cannot run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from actors.acceleration import accelerated
from actors.rollout import Rollout
from ddil_dist.config import RolloutConfig, load_config
from ddil_dist.errors import ConfigError
from ddil_dist.problem import ImitationProblem
from ddil_dist.weights import InMemoryWeightStore, pack
from tests.support.problem import CPU, perturbed
from tests.support.states import Row, rows


def rolled_out(overrides: list[str], *more: str, ticks: int = 24) -> dict[tuple[int, int], Row]:
    """States by trajectory and stop of a rollout with weights that were published twice."""
    config = load_config(None, [*overrides, "rollout.batch_size=4", "rollout.threads=1", *more])
    problem = ImitationProblem.create(config, CPU)
    weights = InMemoryWeightStore()
    rollout = Rollout(config, problem, weights=weights, replay=None, writer="one")  # type: ignore[arg-type]
    states: list[Row] = []
    for version in (0, 2):
        trained = perturbed(problem.new_student(), seed=version)
        weights.publish(pack(trained.state_dict(), version=version, progress=0.7))
        assert rollout.refresh() is not None
        states += rows(*(made for _ in range(ticks) for made in rollout.engine.tick()))
    assert {state.policy_version for state in states} == {None, 0, 2}
    return {(state.trajectory_id, state.step_index): state for state in states}


def worst(ours: dict[tuple[int, int], Row], theirs: dict[tuple[int, int], Row]) -> float:
    """Largest absolute difference of latents and labels, with the same prompts, sources and versions everywhere."""
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    found = 0.0
    for key, one in ours.items():
        other = theirs[key]
        assert (one.source, one.policy_version, one.prompt) == (other.source, other.policy_version, other.prompt)
        for mine, its in ((one.x_t, other.x_t), (one.answer, other.answer)):
            found = max(found, float((mine - its).abs().max()))
    return found


def test_channels_last_rolls_out_the_same_states(tiny_overrides: list[str]) -> None:
    plain, faster = rolled_out(tiny_overrides), rolled_out(tiny_overrides, "rollout.channels_last=true")
    assert worst(plain, faster) < 2e-3


def test_bfloat16_networks_roll_out_nearly_the_same_states(tiny_overrides: list[str]) -> None:
    plain = rolled_out(tiny_overrides)
    faster = rolled_out(tiny_overrides, "rollout.precision=bfloat16", "teacher.precision=bfloat16")
    size = max(float(state.x_t.abs().max()) for state in plain.values())
    assert 0 < worst(plain, faster) < 0.1 * size


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("default")  # compiling imports parts of torch that are deprecated
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
@pytest.mark.timeout(900)
def test_compiled_networks_roll_out_the_same_states(tiny_overrides: list[str]) -> None:
    plain, faster = rolled_out(tiny_overrides), rolled_out(tiny_overrides, "rollout.compile=default")
    assert worst(plain, faster) < 2e-3


def test_cuda_graphs_want_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.compile: 'reduce-overhead' .* on the cpu; .*num_gpus"):
        accelerated(torch.nn.Linear(1, 1), RolloutConfig(compile="reduce-overhead"), CPU)


def test_compiling_wants_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"rollout\.compile: 'default' .* no no-such-compiler on this actor's .*CXX"):
        accelerated(torch.nn.Linear(1, 1), RolloutConfig(compile="default"), CPU)


def test_a_network_is_itself_unless_asked_otherwise() -> None:
    network = torch.nn.Conv2d(2, 2, 3)
    assert accelerated(network, RolloutConfig(), CPU) is network
    assert not network.weight.is_contiguous(memory_format=torch.channels_last)
    accelerated(network, RolloutConfig(channels_last=True), CPU)
    assert network.weight.is_contiguous(memory_format=torch.channels_last)
