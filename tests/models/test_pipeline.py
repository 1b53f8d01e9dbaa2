"""Loading a teacher: what it holds, the VAE's scaling, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from ddil_dist.config import TeacherConfig
from ddil_dist.errors import ConfigError
from ddil_dist.export import export_student
from ddil_dist.models.pipeline import load_teacher
from ddil_dist.problem import ImitationProblem
from tests.support.problem import CPU, tiny_problem
from tests.support.tiny import save_tiny_pipeline, save_tiny_sdxl_pipeline


@pytest.fixture(scope="module")
def problem(tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory)


def images(num: int) -> torch.Tensor:
    return torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_teacher_knows_its_shapes_and_is_frozen(problem: ImitationProblem) -> None:
    teacher = problem.teacher
    assert teacher.latent_shape == (4, 4, 4)
    assert teacher.image_size == 16
    assert teacher.prediction_type == "epsilon"
    assert teacher.schedule.num_timesteps == 1000
    for module in (teacher.pipeline.unet, teacher.pipeline.vae, teacher.pipeline.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_encoding_is_the_scaled_posterior_drawn_by_the_generator(problem: ImitationProblem) -> None:
    vae = problem.teacher.pipeline.vae
    latents = problem.teacher.encode_images(images(3), torch.Generator().manual_seed(5))
    again = problem.teacher.encode_images(images(3), torch.Generator().manual_seed(5))
    assert torch.equal(latents, again)
    with torch.no_grad():
        posterior = vae.encode(images(3)).latent_dist
    drawn = posterior.sample(torch.Generator().manual_seed(5)) * vae.config.scaling_factor
    torch.testing.assert_close(latents, drawn)


def test_decoding_undoes_the_scaling_and_gives_0_to_1(problem: ImitationProblem) -> None:
    vae = problem.teacher.pipeline.vae
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    decoded = problem.teacher.decode_latents(latents)
    with torch.no_grad():
        theirs = vae.decode(latents / vae.config.scaling_factor).sample
    theirs = problem.teacher.pipeline.image_processor.postprocess(theirs, output_type="pt")
    torch.testing.assert_close(decoded, theirs)
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.pipeline: no directory at .*nowhere"):
        load_teacher(TeacherConfig(pipeline=str(tmp_path / "nowhere")), CPU)


def test_a_directory_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model_index\.json"):
        load_teacher(TeacherConfig(pipeline=str(tmp_path)), CPU)


def test_a_pipeline_of_another_class_names_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ConfigError, match=r"is a FluxPipeline; supported: StableDiffusionPipeline, StableDi"):
        load_teacher(TeacherConfig(pipeline=str(tmp_path)), CPU)


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_teacher(TeacherConfig(pipeline=str(tmp_path)), CPU)


def test_a_pipeline_without_its_weights_is_a_config_error(tiny_directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_directory / "pipeline", tmp_path / "p")
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"teacher\.pipeline: .* does not load"):
        load_teacher(TeacherConfig(pipeline=str(path)), CPU)


def test_a_scheduler_of_another_prediction_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_directory / "pipeline", tmp_path / "p")
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "flow_prediction"}))
    with pytest.raises(ConfigError, match=r"predicts 'flow_prediction'; supported: epsilon, v_prediction, sample"):
        load_teacher(TeacherConfig(pipeline=str(path)), CPU)


def test_a_student_that_makes_no_ddim_steps_is_refused_as_a_teacher(tiny_directory: Path, tmp_path: Path) -> None:
    problem = tiny_problem(
        tiny_directory,
        "objective.type=consistency",
        "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]",
    )
    export_student(problem, problem.new_student().state_dict(), tmp_path / "s")
    with pytest.raises(ConfigError, match=r"by an LCMScheduler, so it is itself distilled, and makes no DDIM"):
        load_teacher(TeacherConfig(pipeline=str(tmp_path / "s")), CPU)


def test_epsilon_at_zero_terminal_snr_is_refused(tmp_path: Path) -> None:
    path = save_tiny_pipeline(tmp_path / "p", rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match=r"teacher\.pipeline: .* predicts epsilon, and .* zero terminal SNR"):
        load_teacher(TeacherConfig(pipeline=str(path)), CPU)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "xl, float16"])
def test_an_exported_pipeline_has_its_teachers_encoders(tiny_directory: Path, tmp_path: Path, kind: str) -> None:
    pipeline, precision = tiny_directory / "pipeline", kind.removeprefix("xl, ")
    if kind != precision:
        pipeline = save_tiny_sdxl_pipeline(tmp_path / "pipeline")
    source = f"teacher.pipeline={pipeline}"
    problem = tiny_problem(tiny_directory, source, f"teacher.precision={precision}")
    export_student(problem, problem.new_student().state_dict(), tmp_path / "student")
    digest = problem.teacher.encoders_digest()
    again = load_teacher(
        TeacherConfig(pipeline=str(tmp_path / "student"), precision=problem.config.teacher.precision), CPU
    )
    assert again.encoders_digest() == digest
    for module in (again.pipeline.vae, again.pipeline.text_encoder):
        with torch.no_grad():
            last = list(module.parameters())[-1].flatten()
            last[-1] = torch.nextafter(last[-1], torch.tensor(9.0, dtype=last.dtype))
        changed = again.encoders_digest()
        assert changed != digest
        digest = changed


def edited(source: Path, target: Path, part: str, **changes: object) -> TeacherConfig:
    """A copy of a pipeline with other settings of a part."""
    path = shutil.copytree(source, target)
    file = path / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return TeacherConfig(pipeline=str(path))


@pytest.mark.parametrize("size", [[4, 4], None])
def test_a_sample_size_may_be_two_numbers_or_the_autoencoders(
    tiny_directory: Path, tmp_path: Path, size: object
) -> None:
    config = edited(tiny_directory / "pipeline", tmp_path / "p", "unet", sample_size=size)
    assert load_teacher(config, CPU).latent_shape == (4, 4, 4)


def test_latents_that_are_no_square_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    config = edited(tiny_directory / "pipeline", tmp_path / "p", "unet", sample_size=[4, 8])
    with pytest.raises(ConfigError, match=r"has the sample_size \[4, 8\]; it must be that of square"):
        load_teacher(config, CPU)


@pytest.mark.parametrize("changes", [{"shift_factor": 0.1}, {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}])
def test_what_the_stock_pipeline_would_not_read_of_an_autoencoder_is_refused(
    tiny_directory: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = edited(tiny_directory / "pipeline", tmp_path / "p", "vae", **changes)
    with pytest.raises(ConfigError, match=rf"has a {next(iter(changes))}, which a StableDiffusionPipeline does not"):
        load_teacher(config, CPU)


def test_an_autoencoder_without_a_posterior_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_directory / "pipeline", tmp_path / "p")
    shutil.rmtree(path / "vae")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ).save_pretrained(path / "vae")  # fmt: skip
    index = path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "vae": ["diffusers", "AutoencoderTiny"]}))
    with pytest.raises(ConfigError, match=r"is an AutoencoderTiny; supported: AutoencoderKL"):
        load_teacher(TeacherConfig(pipeline=str(path)), CPU)


def test_centred_latents_are_read_where_the_stock_pipeline_reads_them(tmp_path: Path) -> None:
    mean, std = [0.1, -0.2, 0.3, 0.4], [2.0, 1.5, 0.5, 1.0]
    source = save_tiny_sdxl_pipeline(tmp_path / "xl")
    teacher = load_teacher(edited(source, tmp_path / "p", "vae", latents_mean=mean, latents_std=std), CPU)
    latents = teacher.encode_images(images(3), torch.Generator().manual_seed(5))
    vae = teacher.pipeline.vae
    with torch.no_grad():
        drawn = vae.encode(images(3)).latent_dist.sample(torch.Generator().manual_seed(5))
    wanted = (drawn - torch.tensor(mean).view(4, 1, 1)) / torch.tensor(std).view(4, 1, 1) * vae.config.scaling_factor
    torch.testing.assert_close(latents, wanted)
    stock = teacher.pipeline(
        "a", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    decoded = teacher.pipeline("a", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    torch.testing.assert_close(teacher.decode_latents(stock), decoded.images, rtol=1e-4, atol=1e-4)
