"""A trained run's policies side by side: teacher, student before and after, from the same noise and prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ddil_dist.config import BUILTIN, RunConfig
from ddil_dist.config.curriculum import STUDENT_DIRECTORY
from ddil_dist.errors import EvaluationStoppedError
from ddil_dist.evaluation.tally import OnBatch, Tally
from ddil_dist.runs import FINISHED_FILE

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ddil_dist.metrics.evaluate import EvaluationNetworks
    from ddil_dist.metrics.results import Results
    from ddil_dist.problem import ImitationProblem

NUM_EXPORT_CHECKED = 8
"""Images that the exported pipeline is compared on, latent by latent."""


DDIM = "DDIM"
SAMPLERS = {"deterministic": DDIM, "renoising": "x_0 with fresh noise", "consistency": "LCM", "trajectory": "TCD"}
"""What the table's protocol calls a student's sampler."""


@dataclass(frozen=True)
class _Contender:
    """A policy to evaluate. sample: (noise, conditioning, guidance scale, noise's generators) -> final latents."""

    name: str
    role: Any
    steps: int
    nfes_per_image: int
    sampler: str
    sample: Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class EvaluationPrompts:
    """What images are made of. classes: the prompted class of each caption, None where captions name none."""

    captions: list[str]
    classes: list[int] | None


def evaluate_run(config: RunConfig, *, console: Console, on_batch: OnBatch = lambda made: None) -> Results:
    """Measure a trained run's policies, write `results.json` and the sample grids, and return the results.

    on_batch is called before every batch of images. Where it raises EvaluationStoppedError, what was measured until
    then is returned, and is written unless results of the whole are there.
    """
    from ddil_dist.best import read_best
    from ddil_dist.card import write_card
    from ddil_dist.config.curriculum import BEST_DIRECTORY
    from ddil_dist.metrics.results import RESULTS_FILE, Results, write_results
    from ddil_dist.problem import ImitationProblem, default_device
    from ddil_dist.report import save_sample_rows

    problem = ImitationProblem.create(config, default_device())
    prompts = evaluation_prompts(config, problem, config.evaluation.num_images)
    student = _load_student(config, problem, STUDENT_DIRECTORY)
    best = read_best(config.run.path / BEST_DIRECTORY)
    networks = evaluation_networks(config, problem)
    policies, rows, teacher_latents = [], [], None
    contenders = _contenders(config, problem, student)
    if best is not None and best.update != config.learner.updates:  # else it is the student
        kept = _load_student(config, problem, BEST_DIRECTORY)
        contenders.append(replace(contenders[-1], name=best.policy_name, sample=_sampler(config, problem, kept)))
    tally = Tally(len(prompts.captions), [each.nfes_per_image for each in contenders], on_batch)
    try:
        for contender in contenders:
            latents, images, seconds = _generate(config, problem, contender, prompts.captions, console, tally)
            teacher_latents = latents if teacher_latents is None else teacher_latents
            policies.append(_result(config, contender, networks, prompts, latents, images, teacher_latents, seconds))
            rows.append((contender.name, images[: config.evaluation.grid_images]))
    except EvaluationStoppedError:
        results = Results(policies, {"unmeasured": [each.name for each in contenders[len(policies) :]]})
        if not policies or (config.run.path / FINISHED_FILE).is_file():
            return results
    else:
        facts: dict[str, Any] = {
            "export_max_abs_difference": _export_difference(config, problem, student, prompts.captions)
        }
        if problem.export_lets_go:
            facts["projection_max_abs_difference"] = _projection_difference(config, problem, student, prompts.captions)
        if best is not None:
            facts["best"] = best.facts()
        results = Results(policies, facts)
        for told in (None, best) if best is not None else (None,):
            write_card(config, results, best=told)
    write_results(config.run.path / RESULTS_FILE, results)
    save_sample_rows(config.run.path, rows, prompts.captions[: config.evaluation.grid_images])
    return results


def _contenders(config: RunConfig, problem: ImitationProblem, student: Any) -> list[_Contender]:
    from ddil_dist.sampling import sample_teacher

    def teacher(steps: int) -> Callable[[Any, Any, Any, Any], Any]:
        policy = problem.teacher_policy(problem.teacher_grid(steps))
        return lambda noise, conditioning, scale, _: sample_teacher(policy, noise, conditioning, scale)

    sampler = SAMPLERS[problem.config.objective.sampler]
    many, few = config.teacher.steps, config.student.steps
    guides = config.teacher.guidance.max > 1 and not problem.teacher_denoiser().embeds_guidance
    calls = 2 if guides else 1
    return [
        _Contender(f"teacher, {many} steps", "teacher", many, calls * many, DDIM, teacher(many)),
        _Contender(f"teacher, {few} steps", "baseline", few, calls * few, DDIM, teacher(few)),
        _Contender(
            f"student before, {few} steps",
            "baseline",
            few,
            few,
            sampler,
            _sampler(config, problem, problem.new_student()),
        ),
        _Contender(f"student, {few} steps", "student", few, few, sampler, _sampler(config, problem, student)),
    ]


def _sampler(config: RunConfig, problem: ImitationProblem, unet: Any) -> Callable[[Any, Any, Any, Any], Any]:
    """A contender's `sample` by a student's network."""
    from ddil_dist.sampling import sample_student

    policy, steps = problem.student_policy(unet.eval(), exported=True), config.student.steps
    return lambda noise, conditioning, scale, generators: sample_student(
        policy, noise, conditioning, scale, generators=generators, num_steps=steps
    )


def _generate(
    config: RunConfig,
    problem: ImitationProblem,
    contender: _Contender,
    captions: list[str],
    console: Console,
    tally: Tally,
) -> tuple[Tensor, Tensor, float]:
    """Final latents and images of every caption, and the seconds an image took (prompt encoding left out)."""
    import torch
    from rich.progress import track

    from ddil_dist.sampling import draw_noise, seeded

    size, latents, images, seconds = config.evaluation.batch_size, [], [], 0.0
    for start in track(range(0, len(captions), size), description=f"{contender.name:<24}", console=console):
        chunk = captions[start : start + size]
        tally.begin(contender.name)
        conditioning = problem.encoder.encode(chunk)
        generators = seeded([config.evaluation.seed + start + offset for offset in range(len(chunk))])
        noise = draw_noise(generators, problem.teacher.latent_shape, problem.device)
        scale = torch.full((len(chunk),), config.evaluation_guidance_scale, device=problem.device)
        begun = time.perf_counter()
        final = contender.sample(noise, conditioning, scale, generators)
        decoded = problem.teacher.decode_latents(final).cpu()
        seconds += time.perf_counter() - begun
        latents.append(final.cpu())
        images.append(decoded)
        tally.end(len(chunk), contender.nfes_per_image)
    return torch.cat(latents), torch.cat(images), seconds / len(captions)


def _result(
    config: RunConfig,
    contender: _Contender,
    networks: EvaluationNetworks | None,
    prompts: EvaluationPrompts,
    latents: Tensor,
    images: Tensor,
    teacher_latents: Tensor,
    seconds_per_image: float,
) -> Any:
    from ddil_dist.metrics.evaluate import Batch, measure_images, metric_intervals, metric_values
    from ddil_dist.metrics.intervals import interval, resampled_means
    from ddil_dist.metrics.protocol import PolicyResult, Protocol
    from ddil_dist.metrics.trajectory import paired_errors, paired_trajectory_error

    metrics, intervals = {}, {}
    if networks is not None:
        found = measure_images([Batch(images, prompts.captions, prompts.classes)], networks)
        metrics, intervals = metric_values(found, networks), metric_intervals(found, networks)
    if contender.role != "teacher":
        metrics["paired_trajectory_error"] = paired_trajectory_error(latents, teacher_latents)
        errors = paired_errors(latents, teacher_latents).numpy()
        intervals["paired_trajectory_error"] = interval(resampled_means(errors[None], seed=0)[:, 0])
    protocol = Protocol(
        sampler=contender.sampler,
        steps=contender.steps,
        nfes_per_image=contender.nfes_per_image,
        guidance_scale=config.evaluation_guidance_scale,
        seed=config.evaluation.seed,
        num_images=len(images),
        feature_network="none" if networks is None else networks.feature_name,
        resize="none" if networks is None else networks.resize,
        clip_model=None if networks is None else networks.clip_name,
    )
    return PolicyResult(
        name=contender.name,
        role=contender.role,
        protocol=protocol,
        metrics=metrics,
        intervals={key: (found.low, found.high) for key, found in intervals.items()},
        seconds_per_image=seconds_per_image,
    )


def _export_difference(config: RunConfig, problem: ImitationProblem, student: Any, captions: list[str]) -> float:
    """Largest absolute difference of final latents between the exported stock pipeline and our own student policy."""
    from ddil_dist.export import export_difference

    difference, _ = export_difference(
        problem,
        lambda: student,
        config.run.path / "student",
        captions[:NUM_EXPORT_CHECKED],
        guidance_scale=config.evaluation_guidance_scale,
        seed=config.evaluation.seed,
    )
    return difference


def _projection_difference(config: RunConfig, problem: ImitationProblem, student: Any, captions: list[str]) -> float:
    """How far a stock pipeline, which does not project, leads away from the student that was trained to."""
    from ddil_dist.export import projection_difference

    return projection_difference(
        problem,
        student,
        captions[:NUM_EXPORT_CHECKED],
        guidance_scale=config.evaluation_guidance_scale,
        seed=config.evaluation.seed,
    )


def _load_student(config: RunConfig, problem: ImitationProblem, directory: str) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(config.run.path / directory, subfolder="unet").to(problem.device)


def _draws_builtin_images(config: RunConfig, problem: ImitationProblem) -> bool:
    """Whether the run's pipelines draw what the built-in one does: it itself, or a student of it in a curriculum."""
    from ddil_dist.builtin import IMAGE_SIZE

    return config.data.path == BUILTIN and problem.teacher.image_size == IMAGE_SIZE


def evaluation_prompts(config: RunConfig, problem: ImitationProblem, num: int) -> EvaluationPrompts:
    """`num` captions: the built-in ones that no training has seen, or those of the run's data, over and over."""
    if _draws_builtin_images(config, problem):
        from ddil_dist import builtin

        pairs = builtin.evaluation_prompts(num)
        return EvaluationPrompts([caption for caption, _ in pairs], [index for _, index in pairs])
    prompts = problem.prompts()
    return EvaluationPrompts([prompts[index % len(prompts)] for index in range(num)], None)


def evaluation_networks(config: RunConfig, problem: ImitationProblem) -> EvaluationNetworks | None:
    """What measures images: the built-in networks for the built-in data, for others what is at hand; None: nothing is.

    Real images are those of the run's data; a run that has prompts alone has none to be compared with.
    """
    if _draws_builtin_images(config, problem):
        from ddil_dist.metrics.evaluate import builtin_networks

        return builtin_networks(device=problem.device)
    from ddil_dist.evaluation.choice import NetworkChoice
    from ddil_dist.evaluation.networks import load_networks, with_reference

    networks, _ = load_networks(NetworkChoice.of_run(config), device=problem.device)
    if networks.features is not None and config.data.path != BUILTIN:
        networks = with_reference(networks, _real_images(config, problem))
    return networks if networks.features or networks.clip or networks.preference else None


def _real_images(config: RunConfig, problem: ImitationProblem) -> Iterator[Tensor]:
    """Batches [B, 3, H, W] in [0, 1] of the data, in its order."""
    data = problem.open_data()
    num, size = min(len(data), config.evaluation.real_images), config.evaluation.batch_size
    for first in range(0, num, size):
        yield (data.images(range(first, min(first + size, num)))[0] + 1) / 2
