"""Several pipelines measured by one protocol, from the same noise and captions, and their differences."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ddil_dist.builtin import evaluation_prompts
from ddil_dist.config import BUILTIN, DataConfig
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.data.prompts import load_prompts
from ddil_dist.errors import ConfigError
from ddil_dist.evaluation.choice import NetworkChoice
from ddil_dist.evaluation.coco import CocoCaptions
from ddil_dist.evaluation.networks import RESIZE, load_distance, load_networks, with_reference
from ddil_dist.evaluation.samples import SampleFolder
from ddil_dist.evaluation.stock import Sampling, StockPipeline
from ddil_dist.metrics.evaluate import (
    Batch,
    EvaluationNetworks,
    Measurements,
    builtin_networks,
    measure_images,
    metric_differences,
    metric_intervals,
    metric_values,
)
from ddil_dist.metrics.intervals import Interval
from ddil_dist.metrics.perceptual import NUM_PROMPTS, NUM_SEEDS, PerceptualDistance, diversity
from ddil_dist.metrics.protocol import PolicyResult, Protocol
from ddil_dist.metrics.results import RESULTS_FILE, Results, write_results
from ddil_dist.models.denoiser import torch_dtype

REAL_BATCH: Final = 50
MOST_REAL: Final = 50_000
"""Real images that FID compares with, at most; papers take no more."""
PACKAGES: Final = ("torch", "diffusers", "transformers", "open_clip_torch")
"""Whose versions a result states."""


@dataclass(frozen=True, kw_only=True)
class PipelineEvaluation:
    """What to measure, and how.

    pipelines:  directories or hub ids; the later ones are compared with the first.
    num_images: of each; None: one of every caption.
    data:       captions, and the real images: what `data.path` takes. preset: a name in `coco.PRESETS`, whose COCO
                is in `data`. prompts: a text file of other captions, one a line.
    diversity:  whether NUM_SEEDS images more of each of NUM_PROMPTS captions are made, to tell how much they differ.
    out:        where images and results go; images that are there already are kept.
    """

    pipelines: Sequence[str]
    sampling: Sampling
    num_images: int | None
    seed: int
    batch_size: int
    precision: str
    networks: NetworkChoice
    data: str
    preset: str | None
    prompts: Path | None
    out: Path
    diversity: bool = False


def evaluate_pipelines(request: PipelineEvaluation, *, device: torch.device, console: Console) -> Results:
    """Sample and measure every pipeline; write `results.json` in `request.out`, and return it.

    Raises ConfigError, DataError or EnvironmentFailure before anything is sampled for what can be known before.
    """
    if request.sampling.steps < 1:
        raise ConfigError(f"--steps: {request.sampling.steps}; must be 1 or more")
    names = [_short(name) for name in request.pipelines]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"--pipelines: two end alike ({', '.join(names)}), and their images would share a folder; copy one"
        )
    captions = _captions(request)
    missing: list[str] = []
    if request.data == BUILTIN:
        networks = builtin_networks(device=device)
    else:
        networks, missing = load_networks(request.networks, device=device)
    for sentence in missing:
        console.print(f"not measured: {sentence}", style="yellow", highlight=False, soft_wrap=True)
    distance = None
    if request.diversity:
        distance = load_distance(request.networks, builtin=request.data == BUILTIN, device=device)
    folders: dict[str, SampleFolder] = {}
    samplers: dict[str, str] = {}
    spread: dict[str, Interval] = {}
    for name in request.pipelines:
        pipeline = StockPipeline(name, request.sampling, device=device, dtype=torch_dtype(request.precision))
        folders[name], samplers[name] = _sample(request, pipeline, captions, console), pipeline.sampler_name
        if distance is not None:
            spread[name] = _diversity(request, pipeline, captions, distance, console)
    if networks.reference is None and networks.features is not None:
        side = next(folders[request.pipelines[0]].batches(1, 1))[1].shape[-1]
        networks = with_reference(networks, track(_real(request, side), description="real images", console=console))
    measured: dict[str, Measurements] = {}
    policies: list[PolicyResult] = []
    for name, folder in folders.items():
        batches = (
            Batch(images, [captions[index] for index in numbers])
            for numbers, images in folder.batches(len(captions), request.batch_size)
        )
        steps = -(-len(captions) // request.batch_size)
        shown = track(batches, total=steps, description=f"measuring {_short(name)}", console=console)
        measured[name] = measure_images(shown, networks)
        result = _result(request, name, samplers[name], networks, measured[name], folder)
        policies.append(result if distance is None else _with_diversity(result, spread[name], distance, captions))
    facts: dict[str, Any] = {
        "captions": str(request.prompts or request.preset or request.data),
        "num_real_images": 0 if networks.reference is None else networks.reference.count,
        "versions": {package: version(package) for package in PACKAGES},
        "not_measured": missing,
        "differences": _differences(request, measured, networks),
    }
    results = Results(policies, facts)
    write_results(request.out / RESULTS_FILE, results)
    return results


def _captions(request: PipelineEvaluation) -> list[str]:
    if request.prompts is not None:
        found = load_prompts(DataConfig(prompts=request.prompts), None)
    elif request.preset is not None:
        found = CocoCaptions.open(Path(request.data), request.preset).captions
    elif request.data == BUILTIN:
        found = [caption for caption, _ in evaluation_prompts(1000)]
    else:
        found = ImageTextData.open(DataConfig(path=request.data), image_size=64).captions()
    num = len(found) if request.num_images is None else request.num_images
    if num > len(found):
        raise ConfigError(f"--images: {num}, and there are {len(found)} captions; set {len(found)} or less")
    if num < 2:
        raise ConfigError(f"--images: {num}; metrics compare images: set 2 or more")
    return found[:num]


def _real(request: PipelineEvaluation, side: int) -> Iterator[Tensor]:
    """Batches [B, 3, side, side] in [0, 1] of the real images."""
    if request.preset is not None:
        coco = CocoCaptions.open(Path(request.data), request.preset)
        for begin in range(0, len(coco.files), REAL_BATCH):
            rows = range(begin, min(begin + REAL_BATCH, len(coco.files)))
            yield torch.stack([coco.image(row, side) for row in rows])
        return
    data = ImageTextData.open(DataConfig(path=request.data), image_size=side)
    num = min(len(data), MOST_REAL)
    for begin in range(0, num, REAL_BATCH):
        yield (data.images(range(begin, min(begin + REAL_BATCH, num)))[0] + 1) / 2


def _sample(
    request: PipelineEvaluation, pipeline: StockPipeline, captions: Sequence[str], console: Console, part: str = ""
) -> SampleFolder:
    """A pipeline's image of each caption, those that are missing made now; part: names others than the main ones."""
    protocol = {
        "pipeline": pipeline.name,
        **asdict(request.sampling),
        "scheduler": pipeline.sampler_name,
        "seed": request.seed,
        "precision": request.precision,
        "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
    }
    short = _short(pipeline.name)
    folder = SampleFolder(request.out / f"samples{part}" / short, protocol)
    missing = folder.missing(len(captions))
    batches = [missing[i : i + request.batch_size] for i in range(0, len(missing), request.batch_size)]
    for rows in track(batches, description=f"sampling {short}{part.replace('-', ', ')}", console=console):
        begun = time.perf_counter()
        images, calls = pipeline([captions[row] for row in rows], [request.seed + row for row in rows])
        folder.add(rows, images, seconds=time.perf_counter() - begun, rows=calls)
    return folder


def _diversity(
    request: PipelineEvaluation,
    pipeline: StockPipeline,
    captions: Sequence[str],
    distance: PerceptualDistance,
    console: Console,
) -> Interval:
    """How far a pipeline's images of one caption lie apart, over the first distinct captions."""
    asked = _distinct(captions)
    again = [caption for caption in asked for _ in range(NUM_SEEDS)]
    folder = _sample(request, pipeline, again, console, "-diversity")
    return diversity((images for _, images in folder.batches(len(again), NUM_SEEDS)), distance)


def _distinct(captions: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(captions))[:NUM_PROMPTS]


def _with_diversity(
    result: PolicyResult, found: Interval, distance: PerceptualDistance, captions: Sequence[str]
) -> PolicyResult:
    told = f"{distance.name}; {len(_distinct(captions))} prompts, {NUM_SEEDS} images each"
    return replace(
        result,
        protocol=replace(result.protocol, diversity=told),
        metrics={**result.metrics, "lpips_diversity": found.value},
        intervals={**result.intervals, "lpips_diversity": (found.low, found.high)},
    )


def _result(
    request: PipelineEvaluation,
    name: str,
    sampler: str,
    networks: EvaluationNetworks,
    measured: Measurements,
    folder: SampleFolder,
) -> PolicyResult:
    intervals = metric_intervals(measured, networks)
    return PolicyResult(
        name=_short(name),
        role="baseline",
        protocol=Protocol(
            sampler=sampler,
            steps=request.sampling.steps,
            nfes_per_image=round(folder.nfes_per_image),
            guidance_scale=request.sampling.guidance_scale,
            seed=request.seed,
            num_images=folder.num_images,
            feature_network=networks.feature_name,
            resize="none" if networks.features is None else RESIZE if request.data != BUILTIN else networks.resize,
            clip_model=networks.clip_name,
        ),
        metrics=metric_values(measured, networks),
        intervals={key: (found.low, found.high) for key, found in intervals.items()},
        seconds_per_image=folder.seconds_per_image,
    )


def _differences(
    request: PipelineEvaluation, measured: Mapping[str, Measurements], networks: EvaluationNetworks
) -> dict[str, dict[str, list[float]]]:
    """Of every later pipeline from the first: value and interval's ends by metric, pairs taken as pairs."""
    first, *others = request.pipelines
    return {
        _short(name): {
            key: [found.value, found.low, found.high]
            for key, found in metric_differences(measured[name], measured[first], networks).items()
        }
        for name in others
    }


def _short(name: str) -> str:
    """A name for tables and folders: the last parts of a path, or an id with a dash, and what keeps two apart."""
    parts = [part for part in Path(name).parts if part not in ("/", ".", "..")]
    return "-".join(parts[-2:])
