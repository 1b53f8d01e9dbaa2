"""Writes the model card from what was measured; states no number of its own."""

from __future__ import annotations

from pathlib import Path

from ddil_dist.builtin.training import classifier, clip, unet, vae
from ddil_dist.builtin.training.measure import ALLOWED_LOSS, MANY_STEPS, NUM_SAMPLES, Quality
from ddil_dist.builtin.training.quality import Score

CARD = """\
# The built-in teacher

A text-to-image latent diffusion pipeline in Stable Diffusion's format that draws 32x32 grey clothes from captions, with
the data and the instruments to distil it and to measure its students. It is made to be small: everything in this folder
takes {size_mb:.1f} MB. `{command}` rebuilds all of it, this page too.

![samples at guidance {best:g}, {many} steps; one column a class](samples.png)

## What is here

| part | parameters | file size |
| --- | ---: | ---: |
{parts}

- `pipeline/` loads with `StableDiffusionPipeline.from_pretrained`. Prompts are at most 16 tokens; images are 32x32.
  U-Net and autoencoder are stored in half precision and load as float32.
- `data/train.parquet`: 4,096 captioned training images, balanced over the ten classes. `data/prompts.txt`: 1,000
  evaluation prompts; line i (from 0) asks for class i mod 10.
- `classifier/`: a classifier of the ten classes ({classifier_accuracy:.2%} on the test set), whose 64 penultimate
  features stand in for Inception's. `reference.safetensors`: mean, covariance and count of the whole test set's
  features, and the features of 2,000 test images.
- `clip/`: an OpenCLIP model ({clip_accuracy:.2%} zero-shot on the test set), loaded by open_clip as `local-dir:`.

## How good it is

{num} images, one for each evaluation prompt, from one seed. Sampler: deterministic DDIM over linspace(0, 999, N + 1)
rounded, descending, the last point dropped; the last step ends at the predicted x_0. Agreement: the share that the
classifier gives the prompt's class. FID here is the Frechet distance of the classifier's features to the test set's
10,000 images; it compares with no FID that is taken on Inception's features, and with none of another sample size.

| steps | guidance scale | agreement | FID |
| ---: | ---: | ---: | ---: |
{scores}
| {num} training images | | | {real_fid:.2f} |
| {num} test images, through the autoencoder | | {reconstruction_agreement:.1%} | {reconstruction_fid:.2f} |

The best guidance scale at {many} steps is {best:g}: the lowest FID among those whose agreement is at most {loss:.0%}
below the classifier's own accuracy. At 7.5, diffusers' default, samples are clear and typical, and less varied. A U-Net
forward at batch 64 takes {forward_1:.3f} s on one CPU thread and {forward_2:.3f} s on two, on the machine of the build.

## How it was trained

On {hardware}, with fixed seeds, in {minutes:.0f} minutes of wall clock: {times}.
Times include whatever else the machine was doing. Another machine or another number of threads rounds differently, so a
rebuild matches in quality and not bit for bit.

- Data: Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): 60,000 training images, padded from 28x28 to 32x32, grey
  repeated to RGB. The captions are ours: {num_templates} phrases around synonyms of the class names, chosen by
  the image's index. The test set was used to measure and to choose the guidance scale,
  never to train.
- Autoencoder: {vae_updates} updates of batch {vae_batch}, then {decoder_updates} of the decoder alone; absolute plus
  squared error and a weak KL term; no perceptual or adversarial loss. `scaling_factor` makes the latents' standard
  deviation one.
- U-Net and text encoder, jointly: {unet_updates} updates of batch {unet_batch}, predicting the noise under
  Stable Diffusion's schedule; captions dropped with probability {drop:g}; AdamW at {unet_lr:g}, constant, then
  falling to zero over the last {unet_fall:.0%}; averaged weights (decay {unet_ema:g}).
- Classifier: {classifier_updates} updates of batch {classifier_batch}. OpenCLIP: {clip_updates} updates of
  batch {clip_batch}, with all pairs of one class as positives.

## What it is not for

It knows ten kinds of clothes and the words of its captions; any other word is noise to it. It is undertrained by the
standards of published Fashion-MNIST models, its classifier is judge of its own teacher, and shirts, coats and pullovers
are often taken for one another, by the classifier too. It exists to test and to demonstrate distillation.

## Licence

Fashion-MNIST is (c) 2017 Zalando SE, under the MIT License: its copyright notice and permission notice apply to the
images in `data/`.

> The MIT License (MIT). Copyright (c) 2017 Zalando SE, https://tech.zalando.com
>
> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
> documentation files (the "Software"), to deal in the Software without restriction, including without
> limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
> Software, and to permit persons to whom the Software is furnished to do so, subject to the following
> conditions: The above copyright notice and this permission notice shall be included in all copies or
> substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS
> OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE
> AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR
> OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
> WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

The trained weights are under the same licence.
"""


def folder_bytes(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _score_row(score: Score) -> str:
    return f"| {score.steps} | {score.guidance_scale:g} | {score.agreement:.1%} | {score.fid:.2f} |"


def write_card(out: Path, quality: Quality, *, unet_updates: int, seconds: dict[str, float], hardware: str) -> None:
    """Write `MODEL_CARD.md` to `out`. seconds: of each stage; hardware: in words, after "On"."""
    from ddil_dist.builtin.captions import TEMPLATES

    files = {
        "U-Net": "pipeline/unet",
        "text encoder": "pipeline/text_encoder",
        "autoencoder": "pipeline/vae",
        "classifier": "classifier",
        "OpenCLIP": "clip",
        "captioned images": "data/train.parquet",
    }
    counts = {name: f"{num:,}" for name, num in quality.parameters.items()}
    parts = [
        f"| {name} | {counts.get(name, '')} | {folder_bytes(out / path) / 1e6:.2f} MB |" for name, path in files.items()
    ]
    text = CARD.format(
        command="python -m ddil_dist.builtin.build",
        size_mb=folder_bytes(out) / 1e6,
        parts="\n".join(parts),
        many=MANY_STEPS,
        num=NUM_SAMPLES,
        best=quality.best_guidance,
        loss=ALLOWED_LOSS,
        classifier_accuracy=quality.classifier_accuracy,
        clip_accuracy=quality.clip_accuracy,
        scores="\n".join(map(_score_row, quality.scores)),
        real_fid=quality.real_fid,
        reconstruction_agreement=quality.reconstruction.agreement,
        reconstruction_fid=quality.reconstruction.fid,
        forward_1=quality.forward_seconds[1],
        forward_2=quality.forward_seconds[2],
        hardware=hardware,
        minutes=sum(seconds.values()) / 60,
        times=", ".join(f"{stage} {s / 60:.0f}" for stage, s in seconds.items() if s >= 30),
        num_templates=len(TEMPLATES),
        vae_updates=f"{vae.PLAN.updates:,}",
        decoder_updates=f"{vae.DECODER_PLAN.updates:,}",
        vae_batch=vae.PLAN.batch_size,
        unet_updates=f"{unet_updates:,}",
        unet_batch=unet.PLAN.batch_size,
        drop=unet.DROP_CAPTION,
        unet_lr=unet.PLAN.lr,
        unet_fall=unet.PLAN.fall,
        unet_ema=unet.PLAN.ema_decay,
        classifier_updates=f"{classifier.PLAN.updates:,}",
        classifier_batch=classifier.PLAN.batch_size,
        clip_updates=f"{clip.PLAN.updates:,}",
        clip_batch=clip.PLAN.batch_size,
    )
    (out / "MODEL_CARD.md").write_text(text, encoding="utf-8")
