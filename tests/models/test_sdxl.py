"""Stable Diffusion XL: what its network is told; teacher and student against the stock pipeline, latent by latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from torch import Tensor

from ddil_dist.export import export_student
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.models.student import GUIDANCE_PROJECTION
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import sample_student, sample_teacher
from tests.support.problem import perturbed, tiny_problem
from tests.support.tiny import save_tiny_data, save_tiny_sdxl_pipeline

PROMPTS = ["a red square", "ein grünes Dreieck", ""]


LAYOUTS: dict[str, dict[str, Any]] = {
    "zeros": {},
    "empty": {"force_zeros_for_empty_prompt": False},
    "pruned": {"pruned": True, "prediction_type": "v_prediction"},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(f"sdxl_{request.param}")
    save_tiny_sdxl_pipeline(path / "pipeline", **LAYOUTS[request.param])
    save_tiny_data(path / "data.parquet", num=2)
    return path


@pytest.fixture(scope="module")
def problem(directory: Path) -> ImitationProblem:
    return tiny_problem(directory)


def stock(path: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def start_noise() -> Tensor:
    return torch.randn(len(PROMPTS), 4, 4, 4, generator=torch.Generator().manual_seed(7))


def scales(value: float) -> Tensor:
    return torch.full((len(PROMPTS),), value)


def test_the_network_is_told_what_the_stock_pipeline_tells_it(problem: ImitationProblem, directory: Path) -> None:
    """Recorded from the stock pipeline's own call: hidden states, pooled outputs and sizes of both branches."""
    pipeline = stock(directory / "pipeline")
    told: list[dict[str, Any]] = []
    pipeline.unet.register_forward_pre_hook(lambda _, args, options: told.append(options), with_kwargs=True)
    pipeline(PROMPTS, num_inference_steps=1, guidance_scale=3.0, latents=start_noise(), output_type="latent")
    ours = Conditioning.cat([problem.encoder.null().expand(len(PROMPTS)), problem.encoder.encode(PROMPTS)])
    assert ours.pooled is not None
    assert ours.size_ids is not None
    torch.testing.assert_close(ours.embeddings, told[0]["encoder_hidden_states"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.pooled, told[0]["added_cond_kwargs"]["text_embeds"], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.size_ids, told[0]["added_cond_kwargs"]["time_ids"])
    assert ours.size_ids[0].tolist() == [16, 16, 0, 0, 16, 16]


def test_rows_of_all_three_tensors_move_together(problem: ImitationProblem) -> None:
    rows = problem.encoder.encode(PROMPTS)
    target = problem.encoder.null().expand(4).clone()
    target.assign(torch.tensor([3, 1]), rows.select(torch.tensor([0, 1])))
    assert rows.pooled is not None
    assert target.pooled is not None
    assert torch.equal(target.embeddings[[3, 1]], rows.embeddings[:2])
    assert torch.equal(target.pooled[[3, 1]], rows.pooled[:2])
    null = problem.encoder.null()
    assert null.pooled is not None
    assert torch.equal(target.pooled[[0, 2]], null.pooled.expand(2, -1))
    assert len(target) == 4


@pytest.mark.parametrize("scale", [1.5, 6.0])
def test_the_teacher_is_the_stock_guided_pipeline(directory: Path, problem: ImitationProblem, scale: float) -> None:
    pipeline = stock(directory / "pipeline")
    pipeline.scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=problem.teacher.prediction_type,
        solver_order=1,
        timestep_spacing="linspace",
        final_sigmas_type="zero",
    )
    theirs = pipeline(
        PROMPTS, num_inference_steps=8, guidance_scale=scale, latents=start_noise(), output_type="latent"
    ).images
    ours = sample_teacher(problem.teacher_policy(), start_noise(), problem.encoder.encode(PROMPTS), scales(scale))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_the_student_is_its_exported_pipeline(directory: Path, problem: ImitationProblem, tmp_path: Path) -> None:
    network = perturbed(problem.new_student())
    export_student(problem, network.state_dict(), tmp_path / "student")
    pipeline = stock(tmp_path / "student")
    assert pipeline.config.force_zeros_for_empty_prompt == problem.teacher.pipeline.config.force_zeros_for_empty_prompt
    finals = []
    for scale in (1.0, 7.5):
        theirs = pipeline(
            PROMPTS, num_inference_steps=4, guidance_scale=scale, latents=start_noise(), output_type="latent"
        ).images
        policy = problem.student_policy(network)
        finals.append(sample_student(policy, start_noise(), problem.encoder.encode(PROMPTS), scales(scale)))
        torch.testing.assert_close(finals[-1], theirs, rtol=2e-3, atol=2e-3)
    assert (finals[0] - finals[1]).abs().max() > 0.01


def test_a_new_student_has_one_parameter_more_and_is_its_teacher(problem: ImitationProblem) -> None:
    student = problem.new_student()
    assert student.state_dict().keys() - problem.teacher.unet.state_dict().keys() == {GUIDANCE_PROJECTION}
    x_t, t = start_noise(), torch.tensor([999, 500, 3])
    told = problem.encoder.encode(PROMPTS)
    with torch.no_grad():
        ours = problem.student_denoiser(student).predict(x_t, t, told, scales(5.0))
        theirs = problem.teacher.denoiser().predict(x_t, t, told)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_both_text_encoders_are_frozen_and_half_precision_leaves_the_vae_out(directory: Path) -> None:
    problem = tiny_problem(directory, "teacher.precision=float16")
    pipeline = problem.teacher.pipeline
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert pipeline.text_encoder_2.dtype == pipeline.unet.dtype == torch.float16
    assert pipeline.vae.dtype == torch.float32, "its VAE overflows in half precision"
    images = problem.teacher.decode_latents(torch.zeros(1, 4, 4, 4))
    assert torch.isfinite(images).all()
