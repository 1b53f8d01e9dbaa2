"""The shift and the mixtures on a tiny pipeline, against loops written out here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddil_dist.analysis.mixtures import measure_mixtures, num_mixtures
from ddil_dist.analysis.path import SharedPath
from ddil_dist.analysis.shift import measure_shift
from ddil_dist.metrics.trajectory import paired_errors, paired_trajectory_error
from ddil_dist.sampling import draw_noise, sample_student, sample_teacher, seeded
from tests.support.problem import perturbed, tiny_problem

CAPTIONS = ["a red square", "a blue circle", "a green square", "a red circle"] * 4
FORWARD_ONLY = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
KINDS = {
    "deterministic": (),
    "consistency": ("objective.type=consistency", FORWARD_ONLY),
    "renoising": (
        "objective.type=distribution_matching",
        "student.spacing=trailing",
        "rollout.labels=learner",
        FORWARD_ONLY,
    ),
}


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest, tiny_directory: Path) -> SharedPath:
    problem = tiny_problem(tiny_directory, *KINDS[request.param])
    return SharedPath.create(problem, perturbed(problem.new_student(), scale=0.05))


def latents(path: SharedPath, num: int) -> torch.Tensor:
    return torch.randn(num, *path.problem.teacher.latent_shape, generator=torch.Generator().manual_seed(5))


def noise_and_told(path: SharedPath, num: int, seed: int = 3):  # type: ignore[no-untyped-def]
    generators = seeded(range(seed, seed + num))
    noise = draw_noise(generators, path.problem.teacher.latent_shape, path.problem.device)
    scale = torch.full((num,), path.problem.config.evaluation_guidance_scale)
    return generators, noise, path.problem.encoder.encode(CAPTIONS[:num]), scale


def test_the_ends_of_the_mixtures_are_the_samplers_of_both(path: SharedPath) -> None:
    generators, noise, told, scale = noise_and_told(path, 4)
    steps = path.problem.config.student.steps
    finals = []

    def keep(images: torch.Tensor) -> dict[str, float]:
        finals.append(images)
        return {}

    rows = []
    found = measure_mixtures(path, CAPTIONS[:4], keep, seed=3, batch_size=3, advance=rows.append)
    assert len(found) == num_mixtures(path) == len(finals)
    assert sum(rows) == 4 * len(found)
    teacher = sample_teacher(path.teacher, noise, told, scale)
    student = sample_student(path.student, noise, told, scale, generators=generators, num_steps=steps)
    decode = path.problem.teacher.decode_latents
    torch.testing.assert_close(finals[0], decode(teacher), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(finals[-1], decode(student), rtol=1e-4, atol=1e-4)
    assert [mixture.teacher for mixture in found[:5]] == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert found[0].metrics == {}
    wanted = paired_trajectory_error(student, teacher)
    assert found[-1].metrics["paired_trajectory_error"] == pytest.approx(wanted, rel=1e-3)


def test_a_shared_trajectory_is_each_ones_transitions_in_turn(path: SharedPath) -> None:
    batch = path.batch(CAPTIONS[:3], seed=3)
    by_teacher = torch.tensor([[False, True, False, True], [True, True, False, False], [False, False, True, True]])
    found = path.shared(batch, by_teacher[:, : path.num_steps])
    for row in range(3):
        alone = path.batch(CAPTIONS[row : row + 1], seed=3 + row)
        x = alone.noise
        for step in range(path.num_steps):
            x = (path.teacher_step if by_teacher[row, step] else path.student_step)(x, step, alone)
        torch.testing.assert_close(found[row], x[0], rtol=1e-4, atol=1e-5)


def test_errors_are_those_of_the_states_and_prompts_that_are_named(path: SharedPath) -> None:
    data, captions = latents(path, 8), CAPTIONS[:8]
    rows: list[int] = []
    found = measure_shift(path, data, captions, seed=3, batch_size=3, advance=rows.append)
    assert rows == [3, 1]
    assert [point.timestep for point in found.points] == list(path.timesteps)

    _, noise, told, scale = noise_and_told(path, 4)
    schedule = path.problem.teacher.schedule
    batch = path.batch(captions[:4], seed=3)
    own, expert = noise, noise
    for step, point in enumerate(found.points):
        t = torch.full((4,), path.timesteps[step])
        for x_t, error in (
            (schedule.add_noise(data[:4], noise, t), point.error_forward),
            (expert, point.error_teacher),
            (own, point.error_visited),
        ):
            if path.student.uses_noise:
                with torch.no_grad():
                    answer = path.student.predict_x_0(x_t, t, told, scale)
                wanted = x_t
                for index in range(path.stops[step], path.problem.grid.num_steps):
                    wanted = path.teacher.solve(wanted, torch.full((4,), index), told, scale)
            else:
                with torch.no_grad():
                    answer = path.student.step(x_t, torch.full((4,), step), told, scale)
                wanted = path.teacher.solve(x_t, torch.full((4,), step), told, scale)
            assert error.value == pytest.approx(float(paired_errors(answer, wanted).mean()), rel=1e-3)
        own, expert = path.student_step(own, step, batch), path.teacher_step(expert, step, batch)
        assert point.ratio.value == pytest.approx(point.error_visited.value / point.error_forward.value, rel=1e-9)
        assert point.ratio.low <= point.ratio.value <= point.ratio.high
    whole = float(paired_errors(own, expert).mean())
    assert found.points[0].final_error.value == pytest.approx(whole, rel=1e-3)
    assert found.points[0].error_visited.value == pytest.approx(found.points[0].error_teacher.value, rel=1e-3)


def test_states_from_elsewhere_are_told_from_forward_ones_and_forward_ones_are_not(tiny_directory: Path) -> None:
    problem = tiny_problem(tiny_directory)
    path = SharedPath.create(problem, perturbed(problem.new_student(), scale=0.3))
    found = measure_shift(path, 0.2 * latents(path, 64), [CAPTIONS[0]] * 64, seed=3, batch_size=32)
    last = found.points[-1]
    assert last.p_visited < 0.01
    assert last.distance_visited > 10 * abs(last.distance_floor)
    assert found.overall is not None


def test_a_student_that_is_its_teacher_has_no_error(tiny_directory: Path) -> None:
    overrides = ("teacher.steps=4", "teacher.guidance={min: 1, max: 1}", "evaluation.guidance_scale=1")
    problem = tiny_problem(tiny_directory, *overrides, "thresholding={type: none}")
    path = SharedPath.create(problem, problem.new_student())
    found = measure_shift(path, latents(path, 8), CAPTIONS[:8], seed=0, batch_size=8)
    assert all(point.error_visited.value < 1e-8 for point in found.points)
    assert all(point.ratio.value == pytest.approx(1, abs=0.1) for point in found.points)
    assert all(point.final_error.value < 1e-8 for point in found.points)
