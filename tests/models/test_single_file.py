"""One file under the original names: diffusers' own reader makes the same pipeline of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ddil_dist.errors import ExportError
from ddil_dist.export import export_student, main
from ddil_dist.models.single_file import open_clip_text, save_single_file, unet_name
from ddil_dist.problem import ImitationProblem
from tests.support.problem import perturbed, tiny_problem
from tests.support.tiny import save_tiny_sdxl_pipeline

FIXED = "teacher.guidance={min: 3, max: 3}"


def student_of(problem: ImitationProblem, path: Path) -> Path:
    network = problem.new_student()
    perturbed(torch.nn.ParameterList(p for p in network.parameters() if p.requires_grad))
    export_student(problem, network.state_dict(), path)
    return path


def test_diffusers_reads_the_same_networks_from_the_file(tiny_directory: Path, tmp_path: Path) -> None:
    problem = tiny_problem(tiny_directory, FIXED)
    pipeline = DiffusionPipeline.from_pretrained(student_of(problem, tmp_path / "student"))
    save_single_file(pipeline, tmp_path / "one.safetensors")
    read = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tiny_directory / "pipeline"), local_files_only=True
    )
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(read, part).state_dict()
        ours.pop("time_embedding.cond_proj.weight", None)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name].float(), tensor, rtol=0, atol=0)


def test_diffusers_reads_the_unet_and_autoencoder_of_xl(tiny_directory: Path, tmp_path: Path) -> None:
    source = save_tiny_sdxl_pipeline(tmp_path / "xl")
    problem = tiny_problem(tiny_directory, f"teacher.pipeline={source}", FIXED)
    pipeline = DiffusionPipeline.from_pretrained(student_of(problem, tmp_path / "student"))
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    save_single_file(pipeline, tmp_path / "one.safetensors")
    for part in ("unet", "vae"):
        network = type(getattr(pipeline, part))
        read = network.from_single_file(
            str(tmp_path / "one.safetensors"), config=str(source), subfolder=part, local_files_only=True
        )
        ours = getattr(pipeline, part).state_dict()
        ours.pop("time_embedding.cond_proj.weight", None)
        assert ours.keys() == read.state_dict().keys()
        assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in ours.items())
    names = load_file(tmp_path / "one.safetensors").keys()
    assert "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight" in names
    assert "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight" in names


def test_the_second_text_encoder_is_laid_out_as_open_clips() -> None:
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=4
    )
    state = CLIPTextModelWithProjection(config).state_dict()
    found = open_clip_text(state)
    key = next(name for name in state if name.endswith("layers.0.self_attn.k_proj.weight"))
    assert torch.equal(found["transformer.resblocks.0.attn.in_proj_weight"][8:16], state[key]), (
        "queries, keys, values, in that order"
    )
    assert torch.equal(found["text_projection"], state["text_projection.weight"].T)
    assert found["positional_embedding"].shape == (77, 8)
    assert sum(t.numel() for t in found.values()) == sum(
        t.numel() for name, t in state.items() if not name.endswith("position_ids")
    )


def test_names_of_the_full_networks_are_the_originals() -> None:
    v1, xl = [False, True, True, True], [True, True, False]
    assert unet_name("down_blocks.1.attentions.0.proj_in.weight", 2, v1) == "input_blocks.4.1.proj_in.weight"
    assert unet_name("down_blocks.0.downsamplers.0.conv.bias", 2, v1) == "input_blocks.3.0.op.bias"
    assert unet_name("up_blocks.0.upsamplers.0.conv.weight", 2, v1) == "output_blocks.2.1.conv.weight"
    assert unet_name("up_blocks.0.upsamplers.0.conv.weight", 2, xl) == "output_blocks.2.2.conv.weight"
    assert unet_name("up_blocks.3.resnets.2.conv_shortcut.weight", 2, v1) == "output_blocks.11.0.skip_connection.weight"
    assert unet_name("mid_block.resnets.1.norm1.weight", 2, v1) == "middle_block.2.in_layers.0.weight"
    with pytest.raises(ExportError, match="no name for"):
        unet_name("controlnet.weight", 2, v1)


def test_a_student_that_is_told_the_scale_is_refused_with_what_to_do(tiny_directory: Path, tmp_path: Path) -> None:
    problem = tiny_problem(tiny_directory)
    pipeline = DiffusionPipeline.from_pretrained(student_of(problem, tmp_path / "student"))
    with pytest.raises(ExportError, match="Distil at one scale"):
        save_single_file(pipeline, tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


def test_the_command_writes_the_file_of_a_run(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.yaml").write_text("{}\n")
    target = tmp_path / "one.safetensors"
    assert main([str(run), "--single-file", str(target)]) == 2
    assert "there is no student yet" in capsys.readouterr().err
    student_of(tiny_problem(tiny_directory, FIXED), run / "student")
    assert main([str(run), "--single-file", str(target)]) == 0
    assert load_file(target)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"use_linear_projection": True}, r"Stable Diffusion 2\.x"),
        ("scheduler", {"prediction_type": "v_prediction"}, "predicts 'v_prediction'"),
        ("vae", {"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}, "latents_mean and latents_std"),
        ("unet", {"layers_per_block": [1, 2]}, "layers_per_block"),
    ],
)
def test_what_a_reader_would_not_miss_is_refused(
    tiny_directory: Path, tmp_path: Path, part: str, changes: dict[str, object], message: str
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_directory / "pipeline")
    getattr(pipeline, part).register_to_config(**changes)
    with pytest.raises(ExportError, match=message):
        save_single_file(pipeline, tmp_path / "new" / "one.safetensors")
    assert not (tmp_path / "new").exists()
