"""The rollout engine: full batches, right shares, right labels, and trajectories that can be made again alone."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ddil_dist.types import StateSource
from tests.actors.support import (
    BATCH,
    GUIDANCE,
    PROMPTS,
    STUDENT_BATCH,
    Scene,
    answers,
    run,
    trajectories,
)
from tests.support.problem import tiny_problem
from tests.support.states import Row


@pytest.fixture(scope="module")
def scene(tiny_directory: Path) -> Scene:
    return Scene(tiny_problem(tiny_directory))


@pytest.fixture(scope="module")
def one_step(tiny_directory: Path) -> Scene:
    return Scene(tiny_problem(tiny_directory, "student.steps=1", "teacher.steps=2"))


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_every_call_is_full_and_students_make_their_share(scene: Scene, probability: float, labels: bool) -> None:
    engine = scene.engine(labels=labels)
    engine.set_policy(0, student_probability=probability, forward_share=0.0)
    states = run(engine, 220)
    counters = engine.counters
    calls = counters.teacher_calls + counters.student_calls
    assert calls == 220
    assert counters.rows == counters.places
    assert counters.rows == counters.teacher_calls * BATCH + counters.student_calls * STUDENT_BATCH
    assert counters.states == len(states)
    made = Counter(state.source for state in states)
    assert made[StateSource.FORWARD] == 0
    for state in states:
        assert (state.source is StateSource.NOISE) == (state.step_index == 0), "nobody led to pure noise"
        assert state.policy_version is None or state.step_index > 0
    led = len(states) - made[StateSource.NOISE]
    share = made[StateSource.STUDENT] / led
    deviation = (probability * (1 - probability) / led) ** 0.5
    # Beside chance: up to a pool of transitions of the slower policy are under way.
    assert abs(share - probability) <= 4 * deviation + (2 * BATCH / led if 0 < probability < 1 else 0)
    if labels:
        # Every state costs K teacher rows; every student transition, one row more.
        assert counters.teacher_calls * BATCH >= len(states) * scene.problem.grid.substeps
    if probability == 1 and not labels:
        assert counters.teacher_calls == 0
    if probability == 0:
        assert counters.student_calls == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_forward_states_have_their_share_at_full_batches(scene: Scene, share: float) -> None:
    engine = scene.engine(labels=True, forward=True)
    engine.set_policy(0, student_probability=0.5, forward_share=share)
    states = run(engine, 160)
    forward = [state for state in states if state.source is StateSource.FORWARD]
    assert engine.counters.rows == engine.counters.places > 0
    assert abs(len(forward) / len(states) - share) <= (2 * BATCH * 4 / len(states) if 0 < share < 1 else 0)
    if share:
        steps = Counter(state.step_index for state in forward)
        assert set(steps) == {0, 1, 2, 3}
        assert max(steps.values()) < 4 * min(steps.values()), "forward states are spread over the grid"
        assert all(state.policy_version is None for state in forward)


def test_a_new_share_of_forward_states_holds_at_once(scene: Scene) -> None:
    engine = scene.engine(labels=True, forward=True)
    engine.set_policy(0, student_probability=0.5, forward_share=0.8)
    run(engine, 150)
    engine.set_policy(1, student_probability=0.5, forward_share=0.2)
    run(engine, 20)  # what was under way
    states = run(engine, 100)
    forward = sum(state.source is StateSource.FORWARD for state in states)
    assert 0.1 <= forward / len(states) <= 0.3


def test_without_labels_there_are_no_forward_states(scene: Scene) -> None:
    with pytest.raises(AssertionError, match="with their labels"):
        scene.engine(labels=False, forward=True)
    engine = scene.engine(labels=False)
    engine.set_policy(0, student_probability=0.5, forward_share=0.7)
    states = run(engine, 60)
    assert all(state.source is not StateSource.FORWARD for state in states)
    assert all(state.label is None for state in states)


def test_labels_are_the_experts_answers_at_forward_and_rollout_states(scene: Scene) -> None:
    engine = scene.engine(labels=True, forward=True)
    engine.set_policy(0, student_probability=0.5, forward_share=0.4)
    states = run(engine, 60)
    assert {state.source for state in states} == set(StateSource)
    given = torch.stack([state.answer for state in states])
    torch.testing.assert_close(given, answers(scene, states), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("labels", [True, False])
def test_a_trajectory_can_be_made_again_alone_from_its_seed(scene: Scene, labels: bool) -> None:
    engine = scene.engine(labels=labels)
    engine.set_policy(0, student_probability=0.5, forward_share=0.0)
    whole = [group for group in trajectories(run(engine, 120)).values() if len(group) == 4]
    assert len(whole) > 20
    kinds = set()
    for group in whole[::2]:
        seed = group[0].seed
        draws = random.Random(seed)
        prompt, scale = PROMPTS[draws.randrange(len(PROMPTS))], draws.uniform(*GUIDANCE)
        x = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(seed))
        source = None
        for index, state in enumerate(group):
            student = draws.random() < 0.5
            chosen = StateSource.STUDENT if student else StateSource.TEACHER
            assert (state.seed, state.prompt, state.guidance_scale) == (seed, prompt, float(np.float32(scale)))
            assert state.step_index == index
            assert state.source == (StateSource.NOISE if source is None else source)
            torch.testing.assert_close(state.x_t, x, rtol=2e-3, atol=2e-3)
            x = scene.move(x, index, prompt, scale, student=student)
            source = chosen
        kinds.add(tuple(state.source for state in group))
    assert len(kinds) > 4


def test_one_engine_repeats_itself_and_another_seed_differs(scene: Scene) -> None:
    def rolled(seed: int) -> list[Row]:
        engine = scene.engine(labels=True, forward=True, seed=seed)
        engine.set_policy(0, student_probability=0.5, forward_share=0.3)
        return run(engine, 30)

    first, again, other = rolled(5), rolled(5), rolled(6)
    assert [state.trajectory_id for state in first] == [state.trajectory_id for state in again]
    assert all(torch.equal(a.x_t, b.x_t) for a, b in zip(first, again, strict=True))
    assert {state.trajectory_id for state in first}.isdisjoint(state.trajectory_id for state in other)
    assert {state.seed for state in first}.isdisjoint(state.seed for state in other)


def test_forward_states_are_diffused_data_with_its_captions(scene: Scene) -> None:
    engine = scene.engine(labels=True, forward=True)
    engine.set_policy(0, student_probability=0.5, forward_share=1.0)
    states = sorted(run(engine, 30), key=lambda state: state.trajectory_id)
    x_0, captions = scene.problem.forward_data(seed=5).next(len(states) + 2 * BATCH)
    schedule = scene.problem.teacher.schedule
    for state in states:
        row = state.trajectory_id & 0xFFFFFFFF
        assert state.prompt == captions[row]
        noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(state.seed))
        t = torch.tensor([state.timestep])
        x_t = schedule.add_noise(x_0[row].unsqueeze(0), noise.unsqueeze(0), t)[0]
        torch.testing.assert_close(state.x_t, x_t)


def test_every_state_is_well_formed(scene: Scene) -> None:
    engine = scene.engine(labels=True, forward=True)
    engine.set_policy(0, student_probability=0.4, forward_share=0.3)
    states = run(engine, 120)
    assert all(state.timestep == scene.problem.grid.student[state.step_index] for state in states)
    assert all(GUIDANCE[0] <= state.guidance_scale <= GUIDANCE[1] for state in states)
    scales = [state.guidance_scale for state in states]
    assert max(scales) - min(scales) > 0.8 * (GUIDANCE[1] - GUIDANCE[0])
    for group in trajectories(states).values():
        if group[0].source is StateSource.FORWARD:
            assert len(group) == 1
        else:
            # In order and without gaps; the last may still be under way.
            assert [state.step_index for state in group] == list(range(len(group)))
            assert len({(state.prompt, state.guidance_scale, state.seed) for state in group}) == 1
    assert {state.prompt for state in states if state.source is not StateSource.FORWARD} == set(PROMPTS)


def test_a_state_is_not_changed_by_later_ticks(scene: Scene) -> None:
    engine = scene.engine(labels=True)
    engine.set_policy(0, student_probability=0.5, forward_share=0.0)
    states = run(engine, 10)
    before = [(state.x_t.clone(), state.answer.clone()) for state in states]
    run(engine, 40)
    for state, (x, answer) in zip(states, before, strict=True):
        assert torch.equal(state.x_t, x)
        assert torch.equal(state.answer, answer)


@pytest.mark.parametrize("labels", [True, False])
def test_the_version_is_of_the_newest_student_transition(scene: Scene, labels: bool) -> None:
    engine = scene.engine(labels=labels)
    states = []
    for version in (0, 7, 9):
        engine.set_policy(version, student_probability=0.5, forward_share=0.0)
        states += run(engine, 40)
    seen = set()
    for group in trajectories(states).values():
        previous = None
        for state in group:
            if state.step_index > 0 and state.source is StateSource.STUDENT:
                assert state.policy_version is not None
                assert state.policy_version >= (previous or 0)
            else:
                assert state.policy_version == previous, "a teacher's transition keeps the student's version"
            previous = state.policy_version
            seen.add(previous)
    assert seen == {None, 0, 7, 9}


def test_a_new_policy_acts_from_the_next_transition(scene: Scene) -> None:
    engine = scene.engine(labels=False)
    engine.set_policy(3, student_probability=0.5, forward_share=0.0)
    run(engine, 30)
    engine.set_policy(4, student_probability=0.5, forward_share=0.0)
    after = [state for state in run(engine, 30) if state.step_index > 0 and state.source is StateSource.STUDENT]
    assert after
    assert {state.policy_version for state in after} == {4}


@pytest.mark.parametrize("labels", [True, False])
def test_a_student_of_one_step_yields_pure_noise_states(one_step: Scene, labels: bool) -> None:
    engine = one_step.engine(labels=labels)
    engine.set_policy(0, student_probability=0.5, forward_share=0.0)
    states = run(engine, 12)
    assert len(states) >= 12 * BATCH // 2
    assert {(state.step_index, state.timestep) for state in states} == {(0, 999)}
    assert {state.source for state in states} == {StateSource.NOISE}
    assert len({state.trajectory_id for state in states}) == len(states)
    assert all((state.label is None) is not labels for state in states)
