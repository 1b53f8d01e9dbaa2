"""Each way down the grid: its stops, who moves, what is recorded; and trajectories that owe nothing to their batch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

from ddil_dist.methods.rollouts import MixedMode, MultistepMode
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.policy import ConsistencyStudentPolicy, RenoisingStudentPolicy
from ddil_dist.sampling import draw_noise, seeded
from ddil_dist.types import StateSource
from tests.actors.support import BATCH, GUIDANCE, PROMPTS, STUDENT_BATCH, Scene, answers, run
from tests.actors.support import trajectories as by_trajectory
from tests.support.problem import CPU, perturbed, tiny_problem
from tests.support.states import Row

STEPS = (3, 4, 5)
LCM_GRID = ("student.steps=50", "teacher.steps=50", "student.spacing=trailing")


@pytest.fixture(scope="module")
def mixed(tiny_directory: Path) -> Scene:
    return Scene(tiny_problem(tiny_directory))


@pytest.fixture(scope="module")
def consistency(tiny_directory: Path) -> Scene:
    """A student that samples in 3 to 5 steps on the solver's grid of 50."""
    scene = Scene(tiny_problem(tiny_directory, *LCM_GRID), kind=ConsistencyStudentPolicy)
    scene.mode = MultistepMode(tuple(scene.student.path(num) for num in STEPS))
    return scene


@pytest.fixture(scope="module")
def matching(tiny_directory: Path) -> Scene:
    """Mixed rollouts of a re-noising student down to 499, the latent there recorded."""
    problem = tiny_problem(tiny_directory, "student.spacing=trailing")
    return Scene(problem, kind=RenoisingStudentPolicy, mode=MixedMode(2), record="last")


def with_real_networks(scene: Scene) -> Scene:
    """The same scene on the tiny pipeline's own U-Nets, whose rows share convolutions."""
    problem, schedule = scene.problem, scene.problem.teacher.schedule
    real = Scene(problem, kind=type(scene.student), mode=scene.mode, record=scene.record)
    real.teacher = problem.teacher_policy()
    network = perturbed(problem.new_student()).eval()
    real.student = type(scene.student)(Denoiser(network, schedule, "epsilon"), problem.grid, CPU)
    return real


def roll(scene: Scene, ticks: int, *, labels: bool, probability: float = 0.5, **options: Any) -> list[Row]:
    engine = scene.engine(labels=labels, **options)
    engine.set_policy(0, student_probability=probability, forward_share=0.4 if options.get("forward") else 0.0)
    return run(engine, ticks)


def assert_same(ours: Sequence[Row], theirs: Sequence[Row], *, least: int) -> None:
    """States that both have, of the same trajectory and stop, agree in everything."""
    known = {(state.trajectory_id, state.step_index): state for state in theirs}
    both = [(state, known[key]) for state in ours if (key := (state.trajectory_id, state.step_index)) in known]
    assert len(both) >= least
    for one, other in both:
        assert (one.source, one.prompt, one.guidance_scale, one.seed, one.timestep) == (
            other.source,
            other.prompt,
            other.guidance_scale,
            other.seed,
            other.timestep,
        )
        torch.testing.assert_close(one.x_t, other.x_t, rtol=1e-3, atol=1e-3)
        assert (one.label is None) == (other.label is None)
        if one.label is not None:
            torch.testing.assert_close(one.answer, other.answer, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mixed", "consistency", "matching"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_trajectory_is_the_same_in_any_batch(request: pytest.FixtureRequest, name: str, labels: bool) -> None:
    scene: Scene = request.getfixturevalue(name)
    alone = roll(scene, 240, labels=labels, forward=labels, batch_size=1, student_batch_size=1)
    for batch_size, student_batch_size in ((7, 2), (3, 5)):
        together = roll(
            scene, 80, labels=labels, forward=labels, batch_size=batch_size, student_batch_size=student_batch_size
        )
        assert_same(alone, together, least=20)


@pytest.mark.parametrize("name", ["mixed", "consistency", "matching"])
def test_batched_convolutions_change_a_trajectory_by_rounding_only(request: pytest.FixtureRequest, name: str) -> None:
    scene = with_real_networks(request.getfixturevalue(name))
    alone = roll(scene, 40, labels=True, batch_size=1, student_batch_size=1)
    assert_same(alone, roll(scene, 24, labels=True, batch_size=6, student_batch_size=3), least=6)


@pytest.mark.parametrize("labels", [True, False])
def test_a_multistep_student_draws_its_steps_and_is_never_mixed(consistency: Scene, labels: bool) -> None:
    engine = consistency.engine(labels=labels)
    engine.set_policy(3, student_probability=0.0, forward_share=0.0)
    states = run(engine, 400)
    counters = engine.counters
    assert counters.rows == counters.places
    assert {state.source for state in states} == {StateSource.STUDENT, StateSource.NOISE}
    assert all(state.policy_version == (3 if state.step_index else None) for state in states)
    assert (counters.teacher_calls > 0) is labels
    scheduler = LCMScheduler()
    paths = {}
    for num in STEPS:
        scheduler.set_timesteps(num)
        paths[tuple(scheduler.timesteps.tolist())] = num
    visited = [tuple(state.timestep for state in group) for group in by_trajectory(states).values()]
    drawn = Counter(paths[path] for path in visited[: len(visited) // 2])  # the later ones may be under way
    assert set(drawn) == set(STEPS)
    assert max(drawn.values()) < 2 * min(drawn.values())


def test_a_multistep_trajectory_is_the_stock_pipelines(consistency: Scene) -> None:
    scene = with_real_networks(consistency)
    states = roll(scene, 14, labels=False)
    config = scene.problem.teacher.pipeline.scheduler.config
    kept = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset", "clip_sample")
    components = {
        **scene.problem.teacher.pipeline.components,
        "unet": scene.student._denoiser.unet,
        "scheduler": LCMScheduler(**{key: config[key] for key in kept}),
    }
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    whole = 0
    for group in by_trajectory(states).values():
        first = group[0]
        num_steps = next((num for num in STEPS if [s.step_index for s in group] == list(scene.student.path(num))), None)
        if num_steps is None:
            continue
        visited: list[torch.Tensor] = []

        def keep(_: Any, __: int, ___: Any, values: dict[str, Any], visited: list[Any] = visited) -> dict[str, Any]:
            visited.append(values["latents"][0].clone())
            return values

        pipeline(
            first.prompt,
            num_inference_steps=num_steps,
            guidance_scale=first.guidance_scale,
            generator=seeded([first.seed]),
            output_type="latent",
            callback_on_step_end=keep,
        )
        for state, theirs in zip(group[1:], visited[:-1], strict=True):
            torch.testing.assert_close(state.x_t, theirs, rtol=2e-3, atol=2e-3)
        whole += 1
    assert whole >= 3


@pytest.mark.parametrize("name", ["consistency", "matching"])
def test_labels_are_the_experts_at_every_recorded_state(request: pytest.FixtureRequest, name: str) -> None:
    scene: Scene = request.getfixturevalue(name)
    states = roll(scene, 120, labels=True, forward=True)
    expected = {StateSource.FORWARD, StateSource.STUDENT}
    expected |= {StateSource.TEACHER} if name == "matching" else {StateSource.NOISE}
    assert {state.source for state in states} == expected
    torch.testing.assert_close(
        torch.stack([state.answer for state in states]), answers(scene, states), rtol=1e-3, atol=1e-3
    )
    forward = sum(state.source is StateSource.FORWARD for state in states) / len(states)
    assert abs(forward - 0.4) < 2 * BATCH * 5 / len(states)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_a_rollout_to_a_noise_level_yields_the_latent_reached(matching: Scene, probability: float) -> None:
    engine = matching.engine(labels=False)
    engine.set_policy(0, student_probability=probability, forward_share=0.0)
    states = run(engine, 200)
    counters = engine.counters
    assert counters.rows == counters.places
    assert {(state.step_index, state.timestep) for state in states} == {(2, 499)}
    assert len({state.trajectory_id for state in states}) == len(states) == counters.trajectories
    student = sum(state.source is StateSource.STUDENT for state in states) / len(states)
    assert abs(student - probability) < (0.15 if probability == 0.5 else 1e-9)
    # Two transitions a state, the teacher's of K rows each; the rest of the rows is under way.
    substeps = matching.problem.grid.substeps
    rows = len(states) * 2 * (probability + (1 - probability) * substeps)
    assert counters.rows == pytest.approx(rows, rel=0.15)


def test_a_re_noised_trajectory_can_be_made_again_alone_from_its_seed(matching: Scene) -> None:
    states = roll(matching, 60, labels=False)
    assert len(states) > 20
    for state in states[::3]:
        draws, generators = random.Random(state.seed), seeded([state.seed])
        prompt, scale = PROMPTS[draws.randrange(len(PROMPTS))], draws.uniform(*GUIDANCE)
        told = (matching.problem.encoder.encode([prompt]), torch.tensor([scale]))
        x = draw_noise(generators, (4, 4, 4), CPU)
        for index in range(2):
            at = torch.tensor([index])
            if draws.random() < 0.5:
                x = matching.student.step(x, at, *told, noise=draw_noise(generators, (4, 4, 4), CPU)).detach()
            else:
                x = matching.teacher.solve(x, at, *told)
        torch.testing.assert_close(state.x_t, x[0], rtol=2e-3, atol=2e-3)


def test_with_labels_the_expert_is_asked_only_where_its_answer_is_recorded(matching: Scene) -> None:
    """A student's way down costs one row a transition; the answer at its end, K."""
    engine = matching.engine(labels=True)
    engine.set_policy(0, student_probability=1.0, forward_share=0.0)
    states = run(engine, 200)
    counters, substeps = engine.counters, matching.problem.grid.substeps
    assert counters.student_calls * STUDENT_BATCH == pytest.approx(2 * len(states), abs=2 * (BATCH + STUDENT_BATCH))
    assert counters.teacher_calls * BATCH == pytest.approx(substeps * len(states), abs=BATCH * (substeps + 1))
