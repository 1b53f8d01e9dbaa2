"""The finished student as a stock pipeline, and the proof that it is one: reloaded, it makes the student's latents.

`python -m ddil_dist.export RUN --single-file FILE` writes a finished run's student for programs that read one file.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ddil_dist.config.curriculum import STUDENT_DIRECTORY
from ddil_dist.errors import DdilError, ExportError
from ddil_dist.models.conditioning import Conditioning, PromptEncoder
from ddil_dist.models.export import export_pipeline, staged
from ddil_dist.models.log_filters import quiet_bars
from ddil_dist.models.lora import LoraNetwork, save_adapter
from ddil_dist.models.student import fix_guidance, tell_in_vain
from ddil_dist.problem import ImitationProblem
from ddil_dist.runs import add_run, run_of
from ddil_dist.sampling import draw_noise, sample_student, seeded

ADAPTER_SUFFIX = "_lora"
TOLERANCE = 1e-4
"""Of the latents' largest difference, relative to their largest magnitude or 1. Found: under 1e-6 on a CPU."""
TOLERANCE_AT_PURE_NOISE = 2e-3
"""Where DPM-Solver++ begins from a terminal SNR of zero, which it takes for 2^-24. Found: 7e-4 for a single step."""
TOLERANCE_ON_GPU = 1e-2
"""Where convolutions may be computed with ten bits of mantissa (TF32)."""


def export_student(problem: ImitationProblem, weights: Mapping[str, Tensor], path: Path) -> None:
    """Write the student's pipeline to `path`, with a scheduler that makes its transitions on its grid.

    weights: the state dict of `problem.new_student()`. An adapter is merged into the pipeline's U-Net, and also written
    by itself, with the scheduler, to the directory `adapter_path(path)`, for `load_lora_weights` on the teacher's own
    pipeline, which must then be called without guidance (`guidance_scale=1`). The pipeline at `path` makes one network
    call a step at any scale; it obeys the scale if the student was trained at several.
    """
    scheduler = problem.student_scheduler()
    network = problem.new_student()
    network.load_state_dict(dict(weights))
    unet = network.merged() if isinstance(network, LoraNetwork) else network
    tell_in_vain(unet)
    if problem.config.teacher.guidance.single is not None:
        fix_guidance(unet, problem.config.teacher.guidance.single)
    export_pipeline(problem.teacher, unet, scheduler, path)
    if not isinstance(network, LoraNetwork):
        return
    with staged(adapter_path(path)) as staging:
        save_adapter(network, staging)
        scheduler.save_pretrained(staging / "scheduler")


def adapter_path(path: Path) -> Path:
    """Where the adapter of the pipeline at `path` is."""
    return path.with_name(path.name + ADAPTER_SUFFIX)


def verify_export(
    problem: ImitationProblem,
    weights: Mapping[str, Tensor],
    path: Path,
    prompts: Sequence[str],
    *,
    guidance_scale: float,
    seed: int = 0,
) -> float:
    """The largest absolute difference of final latents between the exported pipeline, reloaded, and our own policy.

    Both start from the same noise under the exported pipeline's own text encoders. Raises ExportError where the
    difference is not small, as it would be for a wrong grid, scheduler, parameterization or weight.
    """
    difference, magnitude = export_difference(
        problem,
        lambda: reference_student(problem, weights),
        path,
        prompts,
        guidance_scale=guidance_scale,
        seed=seed,
    )
    tolerance = TOLERANCE_ON_GPU if problem.device.type != "cpu" else TOLERANCE
    if problem.teacher.schedule.zero_terminal_snr:
        tolerance = max(tolerance, TOLERANCE_AT_PURE_NOISE)
    if not difference <= tolerance * max(1.0, magnitude):
        raise ExportError(
            f"{path}: the exported pipeline, run by diffusers alone, ends up to {difference:.3g} away from the "
            f"student's own latents, which are of magnitude {magnitude:.3g}; it is not the student that was "
            "trained. Check that the installed diffusers is one that ddil_dist supports, and that the student has not "
            "diverged"
        )
    return difference


def reference_student(problem: ImitationProblem, weights: Mapping[str, Tensor]) -> nn.Module:
    """The student with these weights in float32 throughout, as it is exported, even where its base is not."""
    network = problem.new_student()
    if isinstance(network, LoraNetwork) and network.base_dtype != torch.float32:
        assert problem.config.student.lora is not None
        network = LoraNetwork(copy.deepcopy(problem.teacher.unet).float(), problem.config.student.lora)
    network.load_state_dict(dict(weights))
    return network.eval()


@torch.no_grad()
def export_difference(
    problem: ImitationProblem,
    load_network: Callable[[], nn.Module],
    path: Path,
    prompts: Sequence[str],
    *,
    guidance_scale: float,
    seed: int,
) -> tuple[float, float]:
    """Largest absolute difference of a stock pipeline's final latents from the policy's, and the latter's magnitude.

    load_network: gives the policy's network. It is called when the pipeline is gone again, so that the device holds one
    of the two at a time.
    """
    seeds = [seed + offset for offset in range(len(prompts))]
    stock, conditioning = _stock_latents(problem, path, prompts, guidance_scale=guidance_scale, seeds=seeds)
    generators = seeded(seeds)
    own = sample_student(
        problem.student_policy(load_network(), exported=True),
        draw_noise(generators, problem.teacher.latent_shape, problem.device),
        conditioning,
        torch.full((len(prompts),), guidance_scale, device=problem.device),
        generators=generators,
        num_steps=problem.config.student.steps,
    )
    return float((stock - own).abs().max()), float(own.abs().max())


@torch.no_grad()
def projection_difference(
    problem: ImitationProblem, network: nn.Module, prompts: Sequence[str], *, guidance_scale: float, seed: int
) -> float:
    """Largest absolute difference of final latents between the policy that was trained, which projects, and the one
    that is exported, which may not; see `ImitationProblem.export_lets_go`."""
    conditioning = problem.encoder.encode(prompts)
    scale = torch.full((len(prompts),), guidance_scale, device=problem.device)
    finals = []
    for exported in (False, True):
        generators = seeded([seed + offset for offset in range(len(prompts))])
        noise = draw_noise(generators, problem.teacher.latent_shape, problem.device)
        policy = problem.student_policy(network.eval(), exported=exported)
        steps = problem.config.student.steps
        finals.append(sample_student(policy, noise, conditioning, scale, generators=generators, num_steps=steps))
    return float((finals[0] - finals[1]).abs().max())


def _stock_latents(
    problem: ImitationProblem, path: Path, prompts: Sequence[str], *, guidance_scale: float, seeds: Sequence[int]
) -> tuple[Tensor, Conditioning]:
    """What diffusers alone makes of the pipeline at `path`, and the prompts as its own text encoders tell them."""
    from diffusers import DiffusionPipeline

    with quiet_bars():
        pipeline = DiffusionPipeline.from_pretrained(path, use_safetensors=True).to(problem.device)
    pipeline.set_progress_bar_config(disable=True)
    latents: Tensor = pipeline(
        list(prompts),
        num_inference_steps=problem.config.student.steps,
        guidance_scale=guidance_scale,
        generator=seeded(seeds),
        output_type="latent",
        **problem.config.objective.stock_arguments,
    ).images.float()
    encoder = PromptEncoder(pipeline, problem.device, torch.float32, image_size=problem.teacher.image_size)
    return latents, encoder.encode(prompts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a finished run's student as a single file; exit code 2 where it cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m ddil_dist.export",
        description="Write a finished run's student as one file, under the names of the first Stable Diffusion code.",
        epilog="The program that reads it must sample as the student's model card says: its steps, no guidance.",
    )
    add_run(parser)
    parser.add_argument("--single-file", type=Path, required=True, metavar="FILE", help="such as student.safetensors")
    options = parser.parse_args(arguments)
    try:
        student = run_of(options) / STUDENT_DIRECTORY
        if not (student / "model_index.json").is_file():
            raise ExportError(f"{student}: there is no student yet; run the same launch to its end")
        from diffusers import DiffusionPipeline

        from ddil_dist.models.single_file import save_single_file

        with quiet_bars():
            pipeline = DiffusionPipeline.from_pretrained(student, use_safetensors=True)
        save_single_file(pipeline, options.single_file)
    except DdilError as error:
        print(f"ddil_dist: {error}", file=sys.stderr)
        return 2
    print(options.single_file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
