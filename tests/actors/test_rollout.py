"""One rollout process without its shell: it applies the newest student, and inserts every state once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rollout import Rollout, writer_seed
from ddil_dist.config import load_config
from ddil_dist.errors import WaitTimeoutError
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States, to_tensor
from ddil_dist.types import StateSource
from ddil_dist.weights import InMemoryWeightStore, pack
from tests.support.problem import CPU, perturbed
from tests.support.states import rows


class Inserts:
    """A replay buffer that keeps what is inserted, and lets callers wait `waits` times first."""

    def __init__(self, *, waits: int = 0) -> None:
        self.calls: list[tuple[str, int, States[Any]]] = []
        self.waits = waits

    def insert(self, states: States[Any], *, writer: str, batch_id: int, timeout_s: float) -> bool:
        self.calls.append((writer, batch_id, states))
        if self.waits:
            self.waits -= 1
            raise WaitTimeoutError("an insert waited for samples")
        return True


def keys_of(states: States[Any]) -> set[tuple[int, int]]:
    return {(state.trajectory_id, state.step_index) for state in rows(states)}


def publish(store: InMemoryWeightStore, network: torch.nn.Module, *, version: int, progress: float) -> None:
    store.publish(pack(network.state_dict(), version=version, progress=progress))


def new_rollout(
    overrides: list[str], replay: Inserts, *more: str, writer: str = "actor-0.0", halvings: int = 0
) -> tuple[Rollout, InMemoryWeightStore, ImitationProblem]:
    config = load_config(None, [*overrides, "rollout.batch_size=4", *more])
    problem = ImitationProblem.create(config, CPU)
    store = InMemoryWeightStore()
    rollout = Rollout(config, problem, weights=store, replay=replay, writer=writer, halvings=halvings)  # type: ignore[arg-type]
    return rollout, store, problem


def test_nothing_is_applied_before_the_first_version(tiny_overrides: list[str]) -> None:
    rollout, store, problem = new_rollout(tiny_overrides, Inserts())
    assert rollout.refresh() is None
    with pytest.raises(AssertionError, match="must apply a student first"):
        rollout.work()
    publish(store, problem.new_student(), version=0, progress=0.0)
    applied = rollout.refresh()
    assert applied is not None
    assert applied.version == 0
    assert rollout.refresh() is None, "it is not new any more"
    publish(store, problem.new_student(), version=2, progress=0.1)
    newest = rollout.refresh()
    assert newest == rollout.applied == store.newest()


def test_students_of_the_newest_weights_act_as_often_as_the_prior_says(tiny_overrides: list[str]) -> None:
    replay = Inserts()
    rollout, store, problem = new_rollout(
        tiny_overrides,
        replay,
        "rollout.labels=learner",
        "prior.parts=[{until: 0.5, forward: 0.5, student: 0, teacher: 0.5}, "
        "{until: 1, forward: 0.5, student: 0.5, teacher: 0}]",
    )
    publish(store, problem.new_student(), version=0, progress=0.0)
    rollout.refresh()
    while len(replay.calls) < 3:
        rollout.work()
    early = rows(*(states for _, _, states in replay.calls))
    assert {state.source for state in early} == {StateSource.NOISE, StateSource.TEACHER}
    trained = perturbed(problem.new_student())
    publish(store, trained, version=7, progress=0.5)
    rollout.refresh()
    while len(replay.calls) < 14:
        rollout.work()
    late = rows(*(states for _, _, states in replay.calls[10:]))
    assert {state.source for state in late} == {StateSource.NOISE, StateSource.STUDENT}
    assert {state.policy_version for state in late if state.step_index} == {7}
    by_step = {(state.trajectory_id, state.step_index): state for state in late}
    policy = problem.student_policy(trained)
    checked = 0
    for (trajectory, index), state in by_step.items():
        before = by_step.get((trajectory, index - 1))
        if before is None:
            continue
        x = before.x_t.unsqueeze(0)
        with torch.no_grad():
            wanted = policy.step(
                x,
                torch.tensor([index - 1]),
                problem.encoder.encode([state.prompt]),
                torch.tensor([state.guidance_scale]),
            )
        got = state.x_t.unsqueeze(0)
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
        checked += 1
    assert checked > 4


def test_every_state_is_inserted_once_in_numbered_batches(tiny_overrides: list[str]) -> None:
    replay = Inserts()
    rollout, store, problem = new_rollout(tiny_overrides, replay, "rollout.insert_batch=3", writer="actor-2.5")
    publish(store, problem.new_student(), version=0, progress=0.0)
    rollout.refresh()
    inserted = sum(rollout.work() for _ in range(20))
    assert [(writer, number) for writer, number, _ in replay.calls] == [
        ("actor-2.5", number) for number in range(len(replay.calls))
    ]
    assert all(len(states) == 3 for _, _, states in replay.calls)
    assert inserted == rollout.num_inserted == 3 * len(replay.calls)
    keys = [(state.trajectory_id, state.step_index) for state in rows(*(states for _, _, states in replay.calls))]
    assert len(set(keys)) == len(keys)
    assert rollout.engine.counters.states - inserted < 3


def test_an_insert_that_waited_is_repeated_under_its_number(tiny_overrides: list[str]) -> None:
    replay = Inserts(waits=2)
    rollout, store, problem = new_rollout(tiny_overrides, replay, "rollout.insert_batch=3")
    publish(store, problem.new_student(), version=0, progress=0.0)
    rollout.refresh()
    while rollout.num_inserted < 6:
        rollout.work()
    first, again, once_more, following = replay.calls[:4]
    assert first[2] is again[2] is once_more[2]
    assert [first[:2], again[:2], once_more[:2]] == [("actor-0.0", 0)] * 3
    assert following[1] == 1
    assert keys_of(first[2]).isdisjoint(keys_of(following[2]))


def test_a_deadline_is_an_error_and_loses_no_state(tiny_overrides: list[str]) -> None:
    replay = Inserts(waits=1)
    rollout, store, problem = new_rollout(
        tiny_overrides, replay, "rollout.insert_batch=3", "rollout.insert_timeout_s=1e-9"
    )
    publish(store, problem.new_student(), version=0, progress=0.0)
    rollout.refresh()

    def work_until_an_insert() -> None:
        while not replay.calls:
            rollout.work()

    with pytest.raises(WaitTimeoutError):
        work_until_an_insert()
    rollout.work()
    first, again = replay.calls[:2]
    assert first[:2] == again[:2] == ("actor-0.0", 0)
    assert keys_of(first[2]) == keys_of(again[2])


def test_a_stop_is_noticed_in_a_wait(tiny_overrides: list[str]) -> None:
    replay = Inserts(waits=10**6)
    rollout, store, problem = new_rollout(tiny_overrides, replay, "rollout.insert_batch=3")
    publish(store, problem.new_student(), version=0, progress=0.0)
    rollout.refresh()
    for _ in range(20):
        assert rollout.work(should_stop=lambda: bool(replay.calls)) == 0
    assert len(replay.calls) == 1


def test_the_student_runs_in_the_configured_precision(tiny_overrides: list[str]) -> None:
    replay = Inserts()
    rollout, store, problem = new_rollout(tiny_overrides, replay, "rollout.precision=bfloat16")
    publish(store, problem.new_student(), version=0, progress=0.9)
    rollout.refresh()
    while not replay.calls:
        rollout.work()
    assert {parameter.dtype for parameter in rollout._student.parameters()} == {torch.bfloat16}
    assert {states.x_t.dtype.name for _, _, states in replay.calls} == {"float32"}


@pytest.mark.parametrize(("dtype", "carrier"), [("float16", "float16"), ("bfloat16", "uint16")])
def test_latents_are_inserted_in_the_dtype_that_the_buffer_keeps(
    tiny_overrides: list[str], dtype: str, carrier: str
) -> None:
    found: dict[str, States[Any]] = {}
    for wanted in ("float32", dtype):
        replay = Inserts()
        rollout, store, problem = new_rollout(tiny_overrides, replay, f"replay.latent_dtype={wanted}")
        publish(store, problem.new_student(), version=0, progress=0.9)
        rollout.refresh()
        while not replay.calls:
            rollout.work()
        found[wanted] = replay.calls[0][2]
    exact, kept = found["float32"], found[dtype]
    assert (exact.x_t.dtype.name, kept.x_t.dtype.name) == ("float32", carrier)
    assert kept.label is not None
    assert exact.label is not None
    for ours, theirs in ((kept.x_t, exact.x_t), (kept.label, exact.label)):
        assert torch.equal(to_tensor(ours), to_tensor(theirs).to(getattr(torch, dtype)))


@pytest.mark.parametrize(("halvings", "batch", "student"), [(0, 12, 3), (1, 6, 1), (2, 3, 1), (3, 1, 1), (40, 1, 1)])
def test_halved_batches_fill_and_keep_a_row(tiny_overrides: list[str], halvings: int, batch: int, student: int) -> None:
    replay = Inserts()
    rollout, store, problem = new_rollout(
        tiny_overrides, replay, "rollout.batch_size=12", "rollout.student_batch_size=3", halvings=halvings
    )
    assert rollout.heartbeat()["batch_size"] == batch
    publish(store, problem.new_student(), version=0, progress=0.9)
    rollout.refresh()
    while not replay.calls or not rollout.heartbeat()["student_calls"]:
        rollout.work()
    counters = rollout.engine.counters
    assert counters.rows == counters.teacher_calls * batch + counters.student_calls * student == counters.places


LCM = ("objective.type=consistency", "prior.parts=[{until: 1, forward: 0.5, student: 0.5, teacher: 0}]")
DMD2 = (
    "objective.type=distribution_matching",
    "objective.generator_input=prior",
    "rollout.labels=learner",
    "student.spacing=trailing",
)


@pytest.mark.parametrize(
    ("overrides", "timesteps"),
    [
        ((), {999, 749, 500, 250}),
        (("rollout.until_timestep=500",), {999, 749, 500}),
        (("rollout.until_timestep=499",), {999, 749, 500, 250}),
        (("rollout.until_timestep=999",), {999}),
        (("rollout.until_timestep=600", "rollout.record=last"), {500}),
        (DMD2, {999, 749, 499, 249}),
        ((*DMD2, "rollout.until_timestep=500", "rollout.record=last"), {499}),
        # The stops of LCM's samplers of 3 and of 4 steps.
        ((*LCM, "objective.sampler_steps=[3, 4]"), {999, 679, 339, 759, 499, 259}),
        ((*LCM, "objective.sampler_steps=[3, 4]", "rollout.until_timestep=500"), {999, 679, 339, 759, 499}),
        ((*LCM, "rollout.record=last"), {339, 259, 199}),
    ],
)
def test_states_are_recorded_where_the_run_wants_them(
    tiny_overrides: list[str], overrides: tuple[str, ...], timesteps: set[int]
) -> None:
    replay = Inserts()
    rollout, store, problem = new_rollout(tiny_overrides, replay, *overrides)
    publish(store, perturbed(problem.new_student()), version=0, progress=0.7)
    rollout.refresh()
    for _ in range(60):
        rollout.work()
    states = rows(*(states for _, _, states in replay.calls))
    assert {state.timestep for state in states if state.source is not StateSource.FORWARD} == timesteps
    assert all((state.label is None) is ("rollout.labels=learner" in overrides) for state in states)


@settings(max_examples=100, deadline=None)
@given(run=st.integers(0, 2**31 - 1), writer=st.text(max_size=20))
def test_a_writers_seed_has_31_bits_and_is_always_the_same(run: int, writer: str) -> None:
    assert 0 <= writer_seed(run, writer) < 2**31
    assert writer_seed(run, writer) == writer_seed(run, writer)


def test_lives_of_writers_have_seeds_of_their_own(tiny_directory: Path) -> None:
    seeds = {writer_seed(run, f"actor-{i}.{life}") for run in range(3) for i in range(20) for life in range(20)}
    assert len(seeds) == 1200
