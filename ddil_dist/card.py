"""The model card of an exported student: the README.md that says what it is and how it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from ddil_dist.best import Best
from ddil_dist.config import BUILTIN, RunConfig
from ddil_dist.config.curriculum import BEST_DIRECTORY, STUDENT_DIRECTORY
from ddil_dist.metrics.protocol import PolicyResult, present_metrics
from ddil_dist.metrics.results import Results

CARD_FILE: Final = "README.md"
EXAMPLE_PROMPT: Final = "a photo of an ankle boot"


def write_card(config: RunConfig, results: Results | None = None, *, best: Best | None = None) -> Path:
    """Write the card beside the run's exported student, with the figures of its evaluation where there are any.

    best: what is known of the best student; the card is that one's.
    """
    path = config.run.path / _directory(best) / CARD_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(model_card(config, results, best=best), encoding="utf-8")
    partial.replace(path)
    return path


def _directory(best: Best | None) -> str:
    return STUDENT_DIRECTORY if best is None else BEST_DIRECTORY


def model_card(config: RunConfig, results: Results | None = None, *, best: Best | None = None) -> str:
    """The page: the hub's front matter, what was distilled and how, the call, and the figures with their protocol."""
    teacher, steps, scale = config.teacher, config.student.steps, config.evaluation_guidance_scale
    told = "its built-in pipeline" if teacher.pipeline == BUILTIN else f"`{_name(teacher.pipeline)}`"
    kind = config.objective.title
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if _is_hub_id(teacher.pipeline):
        front["base_model"] = teacher.pipeline
    licence = _licence(teacher.pipeline)
    if licence is not None:
        front["license"] = licence
    front["tags"] = ["diffusion-distillation", "few-step", config.objective.type]
    numbers = {"num_inference_steps": steps, "guidance_scale": scale, **config.objective.stock_arguments}
    size = ", ".join(f"{name}={value:g}" for name, value in numbers.items())
    free = config.objective.runs_at_fewer_steps
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---\n",
        f"# {config.run.name}: {steps} step{'s' if steps > 1 else ''}\n",
        f"A student of {told}, distilled into {steps} by {kind}{_imitation(config)} with ddil_dist. Call it with these "
        "numbers: stock pipelines have no place for a default of either, and would run 50 steps.\n",
        "```python",
        "from diffusers import DiffusionPipeline\n",
        f'pipeline = DiffusionPipeline.from_pretrained("{_directory(best)}")',
        f'pipeline("{EXAMPLE_PROMPT}", {size}).images[0].save("image.png")',
        "```\n",
        f"- Steps: {steps}, by the scheduler that it comes with, whose points in time are those of its training. "
        f"{'It may be run at fewer, too.' if free else 'At another number it was not trained.'}",
        _guidance(config),
        *([] if best is None else [f"- The best of its training, kept at {best.sentence()}."]),
        f"- Licence: {licence if licence is not None else 'that of the model that it was distilled from'}.",
    ]
    if results is not None and results.policies:
        lines += ["", "## Measured", "", *_figures(results)]
    return "\n".join(lines) + "\n"


def _imitation(config: RunConfig) -> str:
    shares = {part.student for part in config.prior.parts} | {part.teacher for part in config.prior.parts}
    return ", on states that the student itself reached, too (DDIL)," if max(shares) > 0 else ""


def _guidance(config: RunConfig) -> str:
    trained = config.teacher.guidance
    if trained.single is not None or not config.student.embeds_guidance:
        return (
            "- Guidance: it answers for the guidance that it was trained at, whatever `guidance_scale` it is called "
            "with, in one network call a step."
        )
    return (
        "- Guidance: told to the network, so it costs nothing: one call a step, at `guidance_scale` "
        f"{trained.min:g} to {trained.max:g}."
    )


def _figures(results: Results) -> list[str]:
    metrics = present_metrics(results.policies)
    head = ["policy", "sampler", "steps", "network calls", *(f"{metric.label} {metric.arrow}" for metric in metrics)]
    rows = [
        head,
        ["---"] * len(head),
        *(_row(policy, [m.key for m in metrics], results) for policy in results.policies),
    ]
    protocol = results.policies[0].protocol
    clip = "" if protocol.clip_model is None else f", CLIP score by {protocol.clip_model}"
    return [
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"{protocol.num_images} images at guidance {protocol.guidance_scale:g}, seed {protocol.seed}; features by "
        f"{protocol.feature_network}, resize: {protocol.resize}{clip}. Figures of other protocols do not compare.",
    ]


def _row(policy: PolicyResult, keys: list[str], results: Results) -> list[str]:
    metrics = {metric.key: metric for metric in present_metrics(results.policies)}
    told = policy.protocol
    return [policy.name, told.sampler, str(told.steps), str(told.nfes_per_image),
            *(metrics[key].show(policy.metrics.get(key)) for key in keys)]  # fmt: skip


def _name(pipeline: str) -> str:
    return pipeline if _is_hub_id(pipeline) else Path(pipeline).name


def _is_hub_id(pipeline: str) -> bool:
    return pipeline != BUILTIN and not Path(pipeline).exists() and pipeline.count("/") == 1


def _licence(pipeline: str) -> str | None:
    """What the teacher's own card says, where it lies beside it."""
    card = Path(pipeline) / CARD_FILE
    if pipeline == BUILTIN or not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    return str(front["license"]) if isinstance(front, dict) and "license" in front else None
