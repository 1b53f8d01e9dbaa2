"""Teacher and student transitions against stock diffusers pipelines, latent by latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline
from torch import Tensor

from ddil_dist.diffusion.grid import Spacing
from ddil_dist.export import export_student
from ddil_dist.policy import ConsistencyStudentPolicy, RenoisingStudentPolicy, StudentPolicy, TeacherPolicy
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import draw_noise, sample_student, seeded
from tests.support.problem import CPU, draw_states, perturbed, tiny_problem
from tests.support.tiny import save_tiny_data, save_tiny_pipeline

PROMPTS = ["a red square", "ein grünes Dreieck", ""]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_tiny_pipeline(path / "pipeline", prediction_type=request.param)
    save_tiny_data(path / "data.parquet", num=2)
    return path


def start_noise() -> Tensor:
    return torch.randn(len(PROMPTS), 4, 4, 4, generator=torch.Generator().manual_seed(7))


def roll(problem: ImitationProblem, policy: TeacherPolicy | StudentPolicy, scale: float) -> Tensor:
    """The policy's final latents from `start_noise`, over the whole student grid."""
    x, conditioning = start_noise(), problem.encoder.encode(PROMPTS)
    move = policy.solve if isinstance(policy, TeacherPolicy) else policy.step
    with torch.no_grad():
        for index in range(problem.grid.num_steps):
            x = move(x, torch.full((len(x),), index), conditioning, torch.full((len(x),), scale))
    return x


def stock_pipeline(path: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_latents(pipeline: Any, *, num_steps: int, scale: float) -> Tensor:
    latents: Tensor = pipeline(
        PROMPTS, num_inference_steps=num_steps, guidance_scale=scale, latents=start_noise(), output_type="latent"
    ).images
    return latents


@pytest.mark.parametrize(
    ("student_steps", "teacher_steps", "spacing"),
    [(4, 8, "linspace"), (5, 5, "trailing"), (1, 6, "linspace"), (2, 16, "trailing")],
)
def test_teacher_is_the_stock_guided_pipeline(
    directory: Path, student_steps: int, teacher_steps: int, spacing: Spacing
) -> None:
    problem = tiny_problem(
        directory, f"student.steps={student_steps}", f"teacher.steps={teacher_steps}", f"student.spacing={spacing}"
    )
    pipeline = stock_pipeline(directory / "pipeline")
    pipeline.scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=problem.teacher.prediction_type,
        solver_order=1,
        algorithm_type="dpmsolver++",
        timestep_spacing=spacing,
        final_sigmas_type="zero",
    )
    ours = roll(problem, problem.teacher_policy(), 3.5)
    theirs = stock_latents(pipeline, num_steps=teacher_steps, scale=3.5)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("num_steps", "spacing"), [(4, "linspace"), (4, "trailing"), (6, "linspace"), (1, "trailing")])
def test_student_is_its_exported_pipeline_run_by_stock_diffusers(
    directory: Path, tmp_path: Path, num_steps: int, spacing: Spacing
) -> None:
    problem = tiny_problem(directory, f"student.steps={num_steps}", "teacher.steps=12", f"student.spacing={spacing}")
    network = perturbed(problem.new_student())
    export_student(problem, network.state_dict(), tmp_path / "s")
    pipeline = stock_pipeline(tmp_path / "s")
    finals = {}
    for scale in (1.0, 2.0, 7.5):
        ours = roll(problem, problem.student_policy(network), scale)
        theirs = stock_latents(pipeline, num_steps=num_steps, scale=scale)
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        finals[scale] = ours
    # The exported student obeys guidance_scale: it is no longer the same at every scale.
    assert (finals[1.0] - finals[7.5]).abs().max() > 0.01
    assert (finals[2.0] - finals[7.5]).abs().max() > 0.01


def stock_student(problem: ImitationProblem, network: Any, scheduler: Any) -> Any:
    """The student's network in a stock pipeline, under a scheduler."""
    components = {**problem.teacher.pipeline.components, "unet": network.eval(), "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lcm_scheduler(problem: ImitationProblem, **options: Any) -> Any:
    """The stock scheduler on the teacher's noise schedule."""
    kept = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset", "clip_sample")
    config = problem.teacher.pipeline.scheduler.config
    return LCMScheduler(**{key: config[key] for key in kept}, **options)


@torch.no_grad()
def own_and_stock_latents(
    problem: ImitationProblem, policy: StudentPolicy, pipeline: Any, num_steps: int | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Final latents of a whole trajectory from the same seeds, ours and the stock pipeline's."""
    generators = seeded([3, 5, 8])
    noise = draw_noise(generators, problem.teacher.latent_shape, CPU)
    conditioning, scales = problem.encoder.encode(PROMPTS), torch.full((len(PROMPTS),), 4.0)
    own = sample_student(policy, noise, conditioning, scales, generators=generators, num_steps=num_steps)
    stock = pipeline(PROMPTS, guidance_scale=4.0, generator=seeded([3, 5, 8]), output_type="latent", **options).images
    return own, stock


def test_a_consistency_student_is_the_stock_pipeline_under_lcms_scheduler(directory: Path) -> None:
    problem = tiny_problem(directory, "student.steps=50", "teacher.steps=50", "student.spacing=trailing")
    network = perturbed(problem.new_student())
    policy = ConsistencyStudentPolicy(problem.student_denoiser(network), problem.grid, CPU)
    pipeline = stock_student(problem, network, lcm_scheduler(problem))
    for num_steps in range(1, 9):
        own, stock = own_and_stock_latents(problem, policy, pipeline, num_steps, num_inference_steps=num_steps)
        torch.testing.assert_close(own, stock, rtol=2e-3, atol=2e-3)


def test_a_renoising_student_is_the_stock_sampler_without_a_boundary_condition(directory: Path) -> None:
    problem = tiny_problem(directory, "student.spacing=trailing")
    assert problem.grid.student == (999, 749, 499, 249)
    network = perturbed(problem.new_student())
    policy = RenoisingStudentPolicy(problem.student_denoiser(network), problem.grid, CPU)
    # At this scaling c_skip is 0 and c_out 1 to float32's precision, and four original steps are the grid.
    scheduler = lcm_scheduler(problem, original_inference_steps=4, timestep_scaling=1e6)
    pipeline = stock_student(problem, network, scheduler)
    own, stock = own_and_stock_latents(problem, policy, pipeline, None, num_inference_steps=4)
    torch.testing.assert_close(own, stock, rtol=2e-3, atol=2e-3)


def test_a_new_student_is_the_unguided_teacher_on_its_own_grid(directory: Path) -> None:
    problem = tiny_problem(directory, "teacher.steps=4")
    student = problem.student_policy(problem.new_student())
    for scale in (1.0, 5.0, 14.0):
        torch.testing.assert_close(
            roll(problem, student, scale), roll(problem, problem.teacher_policy(), 1.0), rtol=1e-4, atol=1e-4
        )


def test_solve_is_its_substeps_in_a_row_for_rows_at_any_grid_point(directory: Path) -> None:
    problem = tiny_problem(directory)
    teacher = problem.teacher_policy()
    x_t, index, conditioning, scales = draw_states(problem, 4)
    together = teacher.solve(x_t, index, conditioning, scales)
    for row in range(4):
        one = torch.tensor([row])
        x = x_t[one]
        for k in range(problem.grid.substeps):
            x = teacher.substep(x, index[one], torch.tensor([k]), conditioning.select(one), scales[one])
        torch.testing.assert_close(together[one], x, rtol=1e-4, atol=1e-4)


def test_teacher_thresholds_its_estimates_and_the_student_does_not(directory: Path) -> None:
    limit = 0.3
    problem = tiny_problem(directory, "thresholding.type=static", f"thresholding.limit={limit}")
    x_t, index, conditioning, scales = draw_states(problem, 4)
    t = problem.grid.teacher_table()[index, 0]
    bare = tiny_problem(directory).teacher_policy().predict_x_0(x_t, t, conditioning, scales)
    assert bare.abs().max() > limit
    projected = problem.teacher_policy().predict_x_0(x_t, t, conditioning, scales)
    torch.testing.assert_close(projected, bare.clamp(-limit, limit), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        student = problem.student_policy(problem.new_student()).predict_x_0(x_t, t, conditioning, scales)
    assert student.abs().max() > limit


def test_each_objective_has_its_kind_of_student_and_thresholds_it_where_its_loss_does(directory: Path) -> None:
    projected = {}
    for objective in ("progressive", "consistency", "distribution_matching"):
        problem = tiny_problem(
            directory,
            f"objective.type={objective}",
            "thresholding.type=static",
            "thresholding.limit=0.3",
            "rollout.labels=learner",
            "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]",
            "student.spacing=trailing",
        )
        policy = problem.student_policy(problem.new_student())
        x_t, index, conditioning, scales = draw_states(problem, 4)
        t = problem.grid.teacher_table()[index, 0]
        with torch.no_grad():
            projected[type(policy)] = bool(policy.predict_x_0(x_t, t, conditioning, scales).abs().max() <= 0.3)
    assert projected == {StudentPolicy: False, ConsistencyStudentPolicy: False, RenoisingStudentPolicy: True}
    with torch.no_grad():
        shipped = problem.student_policy(problem.new_student(), exported=True).predict_x_0(x_t, t, conditioning, scales)
    assert shipped.abs().max() > 0.3, "stock pipelines project nothing"


def test_guidance_moves_the_teacher_away_from_its_unconditional_answer(directory: Path) -> None:
    problem = tiny_problem(directory)
    teacher = problem.teacher_policy()
    x_t, index, conditioning, _ = draw_states(problem, 4)
    t = problem.grid.teacher_table()[index, 0]
    null = problem.encoder.encode([""] * 4)

    def answer(scale: float, told: Any) -> Tensor:
        return teacher.predict_x_0(x_t, t, told, torch.full((4,), scale))

    # x_0 is affine in the network's output, so it obeys the same line through both branches.
    torch.testing.assert_close(
        answer(4.0, conditioning),
        answer(1.0, null) + 4 * (answer(1.0, conditioning) - answer(1.0, null)),
        rtol=2e-3,
        atol=2e-3,
    )


def test_a_teacher_of_scale_one_asks_its_network_once(tiny_directory: Path) -> None:
    guided = tiny_problem(tiny_directory)
    plain = tiny_problem(tiny_directory, "teacher.guidance={min: 1, max: 1}")
    x_t, index, told, _ = draw_states(plain, 4)
    t = torch.tensor(plain.grid.student)[index]
    rows: list[int] = []
    plain.teacher.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    answer = plain.teacher_policy().predict_x_0(x_t, t, told, torch.ones(4))
    assert rows == [4]
    torch.testing.assert_close(answer, guided.teacher_policy().predict_x_0(x_t, t, told, torch.ones(4)))
