"""Adapters over one frozen base: whose memory, whose gradients, and the exported adapter in stock diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from ddil_dist.config import LoraConfig, StudentConfig, load_config
from ddil_dist.errors import ConfigError
from ddil_dist.export import adapter_path, export_student, verify_export
from ddil_dist.models.lora import ADAPTER_FILE, LoraNetwork, inner_unet, save_adapter
from ddil_dist.models.student import create_networks
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import draw_noise, sample_student, seeded
from tests.support.problem import draw_states, perturbed, tiny_problem
from tests.support.tiny import save_tiny_data, save_tiny_sdxl_pipeline

LORA = ("student.lora={rank: 4, alpha: 6}",)
PROMPTS = ["a red square", "ein grünes Dreieck", ""]


@pytest.fixture(scope="module")
def problem(tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory, *LORA)


@pytest.fixture(scope="module")
def sdxl_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdxl_lora")
    save_tiny_sdxl_pipeline(path / "pipeline")
    save_tiny_data(path / "data.parquet", num=2)
    return path


def base_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors below a network, under the teacher's names."""
    unet = inner_unet(network)
    return {n.replace(".base_layer.", "."): p for n, p in unet.named_parameters() if ".lora_" not in n}


def predicted(problem: ImitationProblem, network: nn.Module) -> Tensor:
    x_t, index, told, scales = draw_states(problem, 4)
    return problem.student_denoiser(network).predict(x_t, torch.tensor(problem.grid.student)[index], told, scales)


def test_student_critic_and_teacher_stand_on_the_same_memory(problem: ImitationProblem) -> None:
    networks = problem.new_networks("student", "fake_score")
    teacher = dict(problem.teacher.unet.named_parameters())
    for network in networks.values():
        base = base_tensors(network)
        assert base.keys() == teacher.keys()
        assert all(base[name].data_ptr() == teacher[name].data_ptr() for name in teacher)
        assert not any(parameter.requires_grad for parameter in base.values())
        assert all(".lora_" in name for name, _ in network.named_parameters())
        assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in network.parameters())
    student, critic = (network.state_dict() for network in networks.values())
    assert student.keys() == critic.keys()
    assert not {t.data_ptr() for t in student.values()} & {t.data_ptr() for t in critic.values()}
    assert not any(".lora_" in name for name in teacher), "the teacher's own network has no adapter"


def test_gradients_and_changes_stay_with_their_own_adapter(problem: ImitationProblem) -> None:
    networks = problem.new_networks("student", "fake_score")
    with torch.no_grad():
        before = predicted(problem, networks["fake_score"])
        torch.testing.assert_close(predicted(problem, networks["student"]), before, rtol=0, atol=0)
    perturbed(networks["student"])
    predicted(problem, networks["student"]).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in networks["student"].parameters())
    assert all(p.grad is None for p in networks["fake_score"].parameters())
    assert all(p.grad is None for p in problem.teacher.unet.parameters())
    with torch.no_grad():
        assert torch.equal(predicted(problem, networks["fake_score"]), before)
        assert (predicted(problem, networks["student"]) - before).abs().max() > 1e-3


def test_a_new_adapter_changes_nothing(problem: ImitationProblem) -> None:
    x_t, index, told, _ = draw_states(problem, 4)
    t = torch.tensor(problem.grid.student)[index]
    with torch.no_grad():
        theirs = problem.teacher.denoiser().predict(x_t, t, told)
        torch.testing.assert_close(predicted(problem, problem.new_student()), theirs, rtol=1e-5, atol=1e-6)


def test_an_adapter_is_its_low_rank_product(problem: ImitationProblem) -> None:
    """W x + (alpha / rank) B A x (Hu et al. 2022, Eq. 3), on one linear layer."""
    network = perturbed(problem.new_student(), scale=0.2)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    layer: Any = inner_unet(network).get_submodule(name)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    weights = network.state_dict()
    a, b = weights[f"{name}.lora_A.default.weight"], weights[f"{name}.lora_B.default.weight"]
    assert a.shape[0] == b.shape[1] == 4
    with torch.no_grad():
        ours = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(ours, (6 / 4) * x @ (b @ a).T, rtol=1e-4, atol=1e-5)


def test_as_a_module_it_is_the_adapter_alone(problem: ImitationProblem) -> None:
    network = perturbed(problem.new_student())
    twin = copy.deepcopy(network)
    assert isinstance(twin, LoraNetwork)
    assert twin.state_dict().keys() == network.state_dict().keys()
    base, other = base_tensors(network), base_tensors(twin)
    assert all(base[name].data_ptr() == other[name].data_ptr() for name in base)
    with torch.no_grad():
        assert torch.equal(predicted(problem, twin), predicted(problem, network))
        perturbed(twin, seed=1)
        assert not torch.equal(predicted(problem, twin), predicted(problem, network))
        network.load_state_dict(twin.state_dict())
        assert torch.equal(predicted(problem, twin), predicted(problem, network))
    network.to(torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in problem.teacher.unet.parameters()} == {torch.float32}


def test_checkpointing_recomputes_each_networks_own_activations(problem: ImitationProblem) -> None:
    networks = problem.new_networks("student", "fake_score")
    for seed, network in enumerate(networks.values()):
        perturbed(network, seed=seed)

    def gradients() -> list[Tensor]:
        for network in networks.values():
            network.zero_grad()
            network.train()
        student = predicted(problem, networks["student"])
        critic = predicted(problem, networks["fake_score"])  # between the student's forward pass and its backward pass
        (student.square().mean() + (student * critic).mean()).backward()
        return [p.grad.clone() for network in networks.values() for p in network.parameters() if p.grad is not None]

    plain = gradients()
    for network in networks.values():
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    for kept, recomputed in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-4, atol=1e-6)


def test_a_half_precision_base_takes_a_float32_adapter(tiny_directory: Path) -> None:
    problem = tiny_problem(tiny_directory, *LORA, "teacher.precision=bfloat16")
    network = perturbed(problem.new_student())
    assert {p.dtype for p in base_tensors(network).values()} == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    full = tiny_problem(tiny_directory, *LORA)
    exact = full.new_student()
    exact.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(predicted(problem, network), predicted(full, exact), rtol=0.1, atol=0.05)


def stock(kind: Any, base: Path, adapter: Path, scheduler: Any) -> Any:
    """The teacher's own pipeline with the adapter, as a user of diffusers would load it."""
    pipeline = kind.from_pretrained(base)
    pipeline.load_lora_weights(adapter)
    pipeline.scheduler = scheduler.from_pretrained(adapter / "scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("objective", ["progressive", "consistency"])
@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_the_exported_adapter_makes_the_students_latents_on_the_stock_pipeline(
    tiny_directory: Path, sdxl_directory: Path, tmp_path: Path, layout: str, objective: str
) -> None:
    directory = tiny_directory if layout == "sd" else sdxl_directory
    data_only = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
    problem = tiny_problem(directory, *LORA, f"objective.type={objective}", data_only)
    weights = perturbed(problem.new_student(), scale=0.1).state_dict()
    export_student(problem, weights, tmp_path / "student")
    assert verify_export(problem, weights, tmp_path / "student", PROMPTS, guidance_scale=3.0) < 1e-3
    kind = StableDiffusionPipeline if layout == "sd" else StableDiffusionXLPipeline
    scheduler = DPMSolverMultistepScheduler if objective == "progressive" else LCMScheduler
    pipeline = stock(kind, directory / "pipeline", adapter_path(tmp_path / "student"), scheduler)
    theirs = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=1.0, generator=seeded([1, 2, 3]), output_type="latent"
    ).images
    generators = seeded([1, 2, 3])
    network = problem.new_student()
    policy, noise = problem.student_policy(network), draw_noise(generators, (4, 4, 4), problem.device)
    told, scales = problem.encoder.encode(PROMPTS), torch.ones(3)
    before = sample_student(policy, noise, told, scales, generators=seeded([9, 9, 9]), num_steps=4)
    network.load_state_dict(weights)
    ours = sample_student(policy, noise, told, scales, generators=generators, num_steps=4)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert (ours - before).abs().max() > 0.05


def test_a_student_on_a_half_precision_base_is_exported_in_full(tiny_directory: Path, tmp_path: Path) -> None:
    problem = tiny_problem(tiny_directory, *LORA, "teacher.precision=bfloat16")
    weights = perturbed(problem.new_student(), scale=0.1).state_dict()
    export_student(problem, weights, tmp_path / "student")
    assert verify_export(problem, weights, tmp_path / "student", PROMPTS, guidance_scale=3.0) < 1e-3


def test_targets_that_fit_nothing_are_named(problem: ImitationProblem) -> None:
    config = StudentConfig(lora=LoraConfig(targets=("no_such_layer",)))
    with pytest.raises(ConfigError, match=r"student\.lora\.targets: \['no_such_layer'\] fit no module"):
        create_networks(problem.teacher.unet, config, ["student"])


def test_an_adapter_cannot_be_told_the_guidance_scale() -> None:
    assert not StudentConfig(lora=LoraConfig()).embeds_guidance
    assert StudentConfig().embeds_guidance
    assert not StudentConfig(guidance_embedding=False).embeds_guidance
    with pytest.raises(ConfigError, match=r"student\.guidance_embedding: an adapter changes layers"):
        load_config(None, ["student.lora={}", "student.guidance_embedding=true"])
    with pytest.raises(ConfigError, match=r"student\.guidance_embedding: 'guidance' teaches"):
        load_config(None, ["student.lora={}", "objective.type=guidance", "student.steps=32"])


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_every_adapted_layer_has_the_name_that_all_programs_take(
    tiny_directory: Path, sdxl_directory: Path, tmp_path: Path, layout: str
) -> None:
    """ComfyUI and AUTOMATIC1111's look a layer up as "lora_unet_" and its path in diffusers, joined by underscores."""
    problem = tiny_problem(tiny_directory if layout == "sd" else sdxl_directory, "student.lora={rank: 2, alpha: 6}")
    network = problem.new_student()
    perturbed(network, scale=0.1)
    save_adapter(network, tmp_path)
    saved = load_file(tmp_path / ADAPTER_FILE)
    targets = problem.config.student.lora.targets  # type: ignore[union-attr]
    whole, base = network.merged().state_dict(), problem.teacher.unet.state_dict()
    layers = [name for name, module in problem.teacher.unet.named_modules()
              if name.endswith(tuple(targets)) and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]  # fmt: skip
    assert any(name.endswith("attn2.to_k") for name in layers)
    names = {f"lora_unet_{name.replace('.', '_')}": name for name in layers}
    assert {key.partition(".")[0] for key in saved} == names.keys()
    assert {key.partition(".")[2] for key in saved} == {"lora_down.weight", "lora_up.weight", "alpha"}
    for key, name in names.items():
        down, up = saved[f"{key}.lora_down.weight"], saved[f"{key}.lora_up.weight"]
        change = (up.flatten(1) @ down.flatten(1)).view(base[f"{name}.weight"].shape) * saved[f"{key}.alpha"] / 2
        torch.testing.assert_close(whole[f"{name}.weight"], base[f"{name}.weight"] + change, rtol=1e-4, atol=1e-5)
