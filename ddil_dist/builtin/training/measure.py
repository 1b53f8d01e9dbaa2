"""Everything that the model card states as a number, measured on the assets as they ship."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ddil_dist.builtin.captions import evaluation_caption
from ddil_dist.builtin.classifier import Classifier, read_classifier
from ddil_dist.builtin.training.clip import zero_shot_accuracy
from ddil_dist.builtin.training.dataset import Split, balanced_indices, to_rgb
from ddil_dist.builtin.training.quality import Score, image_grid, sample, score

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
FEW_STEPS = (8, 4, 2)
ALLOWED_LOSS = 0.05
"""How far agreement may fall below the classifier's own accuracy at the guidance scale that is called best."""
MANY_STEPS = 32
NUM_SAMPLES = 1000
SHEET_ROWS = 6


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The card's numbers. Agreement and accuracy are shares, 0 to 1."""

    scores: list[Score]
    """One row a guidance scale at 32 steps, then fewer steps at the best scale."""
    best_guidance: float
    """At 32 steps, the scale of the lowest Frechet distance whose agreement is high enough (`ALLOWED_LOSS`)."""
    classifier_accuracy: float
    """On the 10,000 test images."""
    clip_accuracy: float
    """Zero-shot, on the 10,000 test images."""
    real_fid: float
    """Frechet distance of as many training images: what a perfect teacher would get."""
    reconstruction: Score
    """1,000 test images through the autoencoder; `steps` and `guidance_scale` are 0."""
    parameters: dict[str, int]
    """Parameters of each network."""
    forward_seconds: dict[int, float]
    """Shortest seconds of a U-Net forward at batch 64, by CPU threads."""


def measure(out: Path, train: Split, test: Split, *, device: torch.device) -> tuple[Quality, Tensor]:
    """Measure the assets in `out`; also return a sheet of samples at the best guidance, [60, 3, 32, 32] in [0, 1]."""
    classifier = read_classifier(out / "classifier")
    state = load_file(out / "classifier" / "reference.safetensors")
    reference = (state["mean"], state["covariance"])
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline").to(device)
    prompts, classes = zip(*(evaluation_caption(line) for line in range(NUM_SAMPLES)), strict=True)

    def row(num_steps: int, guidance_scale: float) -> tuple[Score, Tensor]:
        images = sample(pipeline, prompts, num_steps=num_steps, guidance_scale=guidance_scale)
        agreement, fid = score(images, classes, classifier, reference)
        return Score(steps=num_steps, guidance_scale=guidance_scale, agreement=agreement, fid=fid), images

    rows = [row(MANY_STEPS, w) for w in GUIDANCE_SCALES]
    accuracy = _accuracy(classifier, test)
    faithful = [pair for pair in rows if pair[0].agreement >= accuracy - ALLOWED_LOSS]
    best, sheet = min(faithful or rows, key=lambda pair: pair[0].fid)
    few = [row(num_steps, best.guidance_scale)[0] for num_steps in FEW_STEPS]
    real = to_rgb(train.images[balanced_indices(train.labels, NUM_SAMPLES)])
    real_labels = [index % len(set(classes)) for index in range(NUM_SAMPLES)]
    quality = Quality(
        scores=[*(s for s, _ in rows), *few],
        best_guidance=best.guidance_scale,
        classifier_accuracy=accuracy,
        clip_accuracy=zero_shot_accuracy(out / "clip", test, device=device),
        real_fid=score(real, real_labels, classifier, reference)[1],
        reconstruction=_reconstruction(pipeline, test, classifier, reference),
        parameters={
            "U-Net": _num_parameters(pipeline.unet),
            "text encoder": _num_parameters(pipeline.text_encoder),
            "autoencoder": _num_parameters(pipeline.vae),
            "classifier": _num_parameters(classifier),
            "OpenCLIP": sum(t.numel() for t in load_file(out / "clip" / "open_clip_model.safetensors").values()),
        },
        forward_seconds=_forward_seconds(pipeline.unet.to("cpu")),
    )
    return quality, sheet[: 10 * SHEET_ROWS]


def write_quality(quality: Quality, path: Path) -> None:
    """Write the numbers as JSON; `read_quality` reads them back."""
    path.write_text(json.dumps(asdict(quality), indent=2) + "\n", encoding="utf-8")


def read_quality(path: Path) -> Quality:
    """Read what `write_quality` wrote."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["scores"] = [Score(**score) for score in fields["scores"]]
    fields["reconstruction"] = Score(**fields["reconstruction"])
    fields["forward_seconds"] = {int(threads): s for threads, s in fields["forward_seconds"].items()}
    return Quality(**fields)


def write_sheet(sheet: Tensor, path: Path) -> None:
    """Write images [N, 3, 32, 32] in [0, 1], ten a row, as one grey PNG."""
    pixels = (image_grid(sheet, columns=10) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path, optimize=True)


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def _accuracy(classifier: Classifier, split: Split) -> float:
    predicted = torch.cat([classifier(to_rgb(batch)).argmax(dim=1) for batch in split.images.split(500)])
    return float((predicted == split.labels).double().mean())


@torch.no_grad()
def _reconstruction(
    pipeline: StableDiffusionPipeline, test: Split, classifier: Classifier, reference: tuple[Tensor, Tensor]
) -> Score:
    """Score the first thousand test images after encoding and decoding."""
    vae = pipeline.vae
    batches = to_rgb(test.images[:NUM_SAMPLES]).split(100)
    decoded = [vae.decode(vae.encode(b.to(vae.device) * 2 - 1).latent_dist.mean).sample.cpu() for b in batches]
    images = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
    agreement, fid = score(images, test.labels[:NUM_SAMPLES].tolist(), classifier, reference)
    return Score(steps=0, guidance_scale=0.0, agreement=agreement, fid=fid)


@torch.no_grad()
def _forward_seconds(unet: UNet2DConditionModel, *, batch_size: int = 64, repeats: int = 40) -> dict[int, float]:
    """Shortest seconds of one CPU forward at batch 64, on one and on two threads; other work only adds to it."""
    x, t = torch.randn(batch_size, 4, 8, 8), torch.randint(0, 1000, (batch_size,))
    embeddings = torch.randn(batch_size, 16, unet.config.cross_attention_dim)
    threads_before = torch.get_num_threads()
    shortest = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            unet(x, t, embeddings)
            seconds.append(time.perf_counter() - start)
        shortest[threads] = min(seconds)
    torch.set_num_threads(threads_before)
    return shortest
