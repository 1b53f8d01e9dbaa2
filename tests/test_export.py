"""Every kind of student as a stock pipeline: reloaded, it makes the student's latents, and a wrong one is refused."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddil_dist.errors import ExportError
from ddil_dist.export import export_student, projection_difference, reference_student, verify_export
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import draw_noise, sample_student, sample_teacher, seeded
from tests.support.problem import perturbed, tiny_problem
from tests.support.tiny import save_tiny_data, save_tiny_pipeline, save_tiny_sdxl_pipeline

PROMPTS = ["a red square", "ein grünes Dreieck", ""]
DATA_ONLY = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
DMD2 = ("objective.type=distribution_matching", "rollout.labels=learner", DATA_ONLY)

KINDS: dict[str, tuple[str, ...]] = {
    "progressive": (),
    "leading": ("student.spacing=leading",),
    "an explicit grid": ("student.timesteps=[751, 501, 251, 1]",),
    "not told the guidance scale": ("student.guidance_embedding=false",),
    "velocity": ("objective.type=velocity", "student.steps=8"),
    "consistency": ("objective.type=consistency", DATA_ONLY),
    "trajectory consistency": ("objective.type=trajectory_consistency", DATA_ONLY),
    "without noise": ("objective.type=trajectory_consistency", "objective.gamma=0", DATA_ONLY),
    "distribution matching": (*DMD2, "student.spacing=trailing"),
    "three steps of it": (*DMD2, "student.timesteps=[999, 666, 333]", "student.steps=3", "teacher.steps=9"),
    "reflected": (*DMD2, "student.spacing=trailing", "thresholding={type: reflect, limit: 0.5}"),
    "clamped": (*DMD2, "student.spacing=trailing", "thresholding={type: static, limit: 0.5}"),
    "one step": ("objective.type=dmd", "student.steps=1"),
}


@pytest.fixture(scope="module")
def problem(tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory)


def exported(problem: ImitationProblem, path: Path) -> dict[str, torch.Tensor]:
    """Write a student that has moved from its teacher to `path`; its weights."""
    weights = perturbed(problem.new_student()).state_dict()
    export_student(problem, weights, path)
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_the_reloaded_pipeline_makes_the_students_latents(tiny_directory: Path, tmp_path: Path, kind: str) -> None:
    problem = tiny_problem(tiny_directory, *KINDS[kind])
    weights = exported(problem, tmp_path / "student")
    difference = verify_export(problem, weights, tmp_path / "student", PROMPTS, guidance_scale=4.0, seed=5)
    assert difference < 2e-4
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "student").scheduler
    scheduler.set_timesteps(problem.config.student.steps)
    if problem.config.student.timesteps is not None:
        assert tuple(scheduler.timesteps.tolist()) == problem.config.student.timesteps
    assert scheduler.config.prediction_type == ("v_prediction" if kind == "velocity" else "epsilon")


@pytest.mark.parametrize(
    ("pipeline", "limit", "clipped"), [("xl", "0.5", True), ("xl", "[0.5, 1, 2, 0.7]", False), ("sd", "0.5", False)]
)
def test_stock_pipelines_clamp_as_training_does_where_they_can(
    tiny_directory: Path, tmp_path: Path, pipeline: str, limit: str, clipped: bool
) -> None:
    source = save_tiny_sdxl_pipeline(tmp_path / "xl") if pipeline == "xl" else tiny_directory / "pipeline"
    thresholding = f"thresholding={{type: static, limit: {limit}}}"
    problem = tiny_problem(
        tiny_directory, f"teacher.pipeline={source}", *DMD2, "student.spacing=trailing", thresholding
    )
    weights = exported(problem, tmp_path / "student")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    stock.set_progress_bar_config(disable=True)
    assert stock.scheduler.config.clip_sample is clipped
    verify_export(problem, weights, tmp_path / "student", PROMPTS, guidance_scale=4.0)
    finals = stock(
        PROMPTS, num_inference_steps=4, guidance_scale=4.0, generator=seeded([1, 2, 3]), output_type="latent"
    ).images
    generators = seeded([1, 2, 3])
    trained = sample_student(
        problem.student_policy(reference_student(problem, weights)),
        draw_noise(generators, (4, 4, 4), problem.device),
        problem.encoder.encode(PROMPTS),
        torch.full((3,), 4.0),
        generators=generators,
    )
    assert ((finals - trained).abs().max() < 1e-4) == clipped
    assert (finals.abs().max() <= 0.501) == clipped


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage_weights(path: Path) -> None:
    weights = load_file(path)
    weights["conv_out.weight"] *= 1.1
    save_file(weights, path, metadata={"format": "pt"})


def break_weights(path: Path) -> None:
    weights = load_file(path)
    weights["conv_out.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"
MISHAPS = {
    "another grid": lambda path: edit_json(path / SCHEDULER, timestep_spacing="leading"),
    "another parameterization": lambda path: edit_json(path / SCHEDULER, prediction_type="v_prediction"),
    "another end": lambda path: edit_json(path / SCHEDULER, final_sigmas_type="sigma_min"),
    "another order": lambda path: edit_json(path / SCHEDULER, solver_order=2),
    "another weight": lambda path: damage_weights(path / UNET),
    "not a number": lambda path: break_weights(path / UNET),
}


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_pipeline_that_is_not_the_student_is_refused(problem: ImitationProblem, tmp_path: Path, mishap: str) -> None:
    weights = exported(problem, tmp_path / "student")
    verify_export(problem, weights, tmp_path / "student", PROMPTS, guidance_scale=4.0)
    MISHAPS[mishap](tmp_path / "student")
    with pytest.raises(ExportError, match="is not the student that was trained"):
        verify_export(problem, weights, tmp_path / "student", PROMPTS, guidance_scale=4.0)


def test_an_export_says_nothing_of_where_its_teacher_was(problem: ImitationProblem, tmp_path: Path) -> None:
    exported(problem, tmp_path / "student")
    texts = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "student").rglob("*.json")}
    assert len(texts) > 4
    for name, text in texts.items():
        assert "_name_or_path" not in text, name
        assert str(Path(problem.config.teacher.pipeline).parent) not in text, name


def test_older_transformers_find_the_text_encoders_weights(problem: ImitationProblem, tmp_path: Path) -> None:
    exported(problem, tmp_path / "student")
    with safe_open(tmp_path / "student/text_encoder/model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118 - it is no mapping


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_student_of_a_half_precision_teacher_is_exported_whole(
    tiny_directory: Path, tmp_path: Path, precision: str
) -> None:
    problem = tiny_problem(tiny_directory, f"teacher.precision={precision}")
    weights = exported(problem, tmp_path / "student")
    assert verify_export(problem, weights, tmp_path / "student", PROMPTS, guidance_scale=4.0) < 2e-3
    assert problem.teacher.pipeline.text_encoder.dtype == problem.teacher.unet.dtype != torch.float32


def test_a_v_predicting_pipeline_of_zero_terminal_snr_serves_from_end_to_end(tmp_path: Path) -> None:
    """Stable Diffusion 2.x with corrected betas, against DDIM's own scheduler where both take even steps."""
    save_tiny_pipeline(tmp_path / "pipeline", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    save_tiny_data(tmp_path / "data.parquet", num=2)
    problem = tiny_problem(tmp_path, "student.spacing=trailing")
    assert problem.teacher.schedule.zero_terminal_snr
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    theirs = pipeline(PROMPTS, num_inference_steps=8, guidance_scale=3.5, latents=noise, output_type="latent").images
    told = problem.encoder.encode(PROMPTS)
    ours = sample_teacher(problem.teacher_policy(), noise, told, torch.full((3,), 3.5))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    weights = exported(problem, tmp_path / "student")
    assert verify_export(problem, weights, tmp_path / "student", PROMPTS, guidance_scale=4.0) < 1e-4
    uneven = tiny_problem(tmp_path, "student.spacing=linspace")
    weights = exported(uneven, tmp_path / "uneven")
    assert 1e-5 < verify_export(uneven, weights, tmp_path / "uneven", PROMPTS, guidance_scale=4.0) < 2e-3


def test_a_grid_that_no_export_could_carry_is_refused_before_any_work(tiny_directory: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("student.timesteps: no stock scheduler makes [999, 700, 400, 100]")):
        tiny_problem(tiny_directory, "student.timesteps=[999, 700, 400, 100]")
    with pytest.raises(ValueError, match=r"student\.timesteps: begins at 1000, but the teacher was trained on 1000"):
        tiny_problem(tiny_directory, "student.timesteps=[1000, 750, 500, 250]")


UNTOLD = {
    "a single scale": ("teacher.guidance={min: 3, max: 3}",),
    "not told": ("student.guidance_embedding=false",),
    "an adapter": ("student.lora={rank: 2}",),
}


@pytest.mark.parametrize("pipeline", ["sd", "xl"])
@pytest.mark.parametrize("kind", UNTOLD)
def test_a_student_of_one_scale_is_that_at_any_scale_and_in_one_call_a_step(
    tiny_directory: Path, tmp_path: Path, pipeline: str, kind: str
) -> None:
    source = save_tiny_sdxl_pipeline(tmp_path / "xl") if pipeline == "xl" else tiny_directory / "pipeline"
    problem = tiny_problem(tiny_directory, f"teacher.pipeline={source}", *UNTOLD[kind])
    network = problem.new_student()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    perturbed(torch.nn.ParameterList(trained))
    export_student(problem, network.state_dict(), tmp_path / "student")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    stock.set_progress_bar_config(disable=True)
    rows: list[int] = []
    stock.unet.register_forward_pre_hook(lambda _, told, named: rows.append(len(told[0])), with_kwargs=True)
    wanted = sample_student(
        problem.student_policy(network),
        draw_noise(seeded([1, 2, 3]), (4, 4, 4), problem.device),
        problem.encoder.encode(PROMPTS),
        torch.full((3,), 3.0),
    )
    for scale in (1.0, 3.0, 5.0, 7.5):
        rows.clear()
        images = stock(
            PROMPTS, num_inference_steps=4, guidance_scale=scale, generator=seeded([1, 2, 3]), output_type="latent"
        ).images
        assert rows == [3] * 4
        torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-4)


def test_a_teacher_that_obeys_the_scale_is_fixed_at_it(tiny_directory: Path, tmp_path: Path) -> None:
    first = tiny_problem(tiny_directory)
    exported(first, tmp_path / "obedient")
    obedient = f"teacher.pipeline={tmp_path / 'obedient'}"
    free = tiny_problem(tiny_directory, obedient, "student.steps=4", "teacher.steps=4")
    fixed = tiny_problem(tiny_directory, obedient, "teacher.steps=4", "teacher.guidance={min: 3, max: 3}")
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    told = first.encoder.encode(PROMPTS[:2])

    def final(problem: ImitationProblem, scale: float) -> torch.Tensor:
        policy = problem.student_policy(problem.new_student())
        return sample_student(policy, noise, told, torch.full((2,), scale))

    torch.testing.assert_close(final(fixed, 3.0), final(free, 3.0), rtol=1e-4, atol=1e-5)
    assert torch.equal(final(fixed, 7.5), final(fixed, 3.0))
    assert not torch.allclose(final(free, 7.5), final(free, 3.0), atol=1e-3)


def test_how_far_an_export_that_cannot_project_leads_away_is_measured(tiny_directory: Path) -> None:
    tight = tiny_problem(tiny_directory, *KINDS["reflected"])
    wide = tiny_problem(tiny_directory, *DMD2, "student.spacing=trailing", "thresholding={type: reflect, limit: 1e3}")
    assert tight.export_lets_go
    assert wide.export_lets_go
    assert not tiny_problem(tiny_directory, *KINDS["distribution matching"]).export_lets_go
    network = perturbed(tight.new_student())
    assert projection_difference(tight, network, PROMPTS, guidance_scale=4.0, seed=0) > 0.1
    assert projection_difference(wide, network, PROMPTS, guidance_scale=4.0, seed=0) == 0


def test_a_reader_of_the_vocabulary_alone_gets_the_same_tokens(problem: ImitationProblem, tmp_path: Path) -> None:
    exported(problem, tmp_path / "student")
    folder = tmp_path / "student" / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    header, *lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert header.startswith("#version")
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(b for b in range(256) if b not in letters)}

    def encode(text: str) -> list[int]:
        ids = []
        for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
            parts = [letters[byte] for byte in word.encode()]
            parts[-1] += "</w>"
            while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
                first, second = min(pairs, key=ranks.__getitem__)
                place = next(i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == (first, second))
                parts[place : place + 2] = [first + second]
            ids += [vocabulary[part] for part in parts]
        return ids

    tokenizer = problem.teacher.pipeline.tokenizer
    begin, end = vocabulary[tokenizer.bos_token], vocabulary[tokenizer.eos_token]
    for text in ("a red square", "Blue circles, 12", "squarely", "q#"):
        assert tokenizer(text).input_ids == [begin, *encode(text), end]
