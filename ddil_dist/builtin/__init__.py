"""The built-in teacher, its data and its measuring instruments, small enough to ship.

A Stable-Diffusion-format pipeline that draws Fashion-MNIST from captions, 4,096 captioned images, evaluation prompts,
a classifier with reference statistics for Frechet distances, and a small OpenCLIP model. All were made by
`python -m ddil_dist.builtin.build`; `assets/MODEL_CARD.md` says how, and how good they are. Importing this package
imports no torch; the `load_*` functions do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddil_dist.builtin.captions import CLASS_NAMES, caption
from ddil_dist.errors import ConfigError

if TYPE_CHECKING:
    from open_clip import CLIP
    from torch import Tensor

    from ddil_dist.builtin.classifier import Classifier

ASSETS_DIR = Path(__file__).parent / "assets"
PIPELINE_DIR = ASSETS_DIR / "pipeline"
"""A directory for `StableDiffusionPipeline.from_pretrained`."""
DATA_FILE = ASSETS_DIR / "data" / "train.parquet"
"""4,096 captioned training images: columns `image` (struct of PNG bytes and path) and `text`."""
PROMPTS_FILE = ASSETS_DIR / "data" / "prompts.txt"
"""1,000 evaluation prompts, one a line; line i (from 0) is of class i mod 10."""
CLASSIFIER_DIR = ASSETS_DIR / "classifier"
REFERENCE_FILE = CLASSIFIER_DIR / "reference.safetensors"
CLIP_DIR = ASSETS_DIR / "clip"
"""A directory for open_clip's `local-dir:` models."""
IMAGE_SIZE = 32
"""Side of its images, in pixels."""
MODEL_CARD = ASSETS_DIR / "MODEL_CARD.md"

__all__ = [
    "ASSETS_DIR",
    "CLASSIFIER_DIR",
    "CLASS_NAMES",
    "CLIP_DIR",
    "DATA_FILE",
    "IMAGE_SIZE",
    "MODEL_CARD",
    "PIPELINE_DIR",
    "PROMPTS_FILE",
    "REFERENCE_FILE",
    "Reference",
    "caption",
    "evaluation_prompts",
    "load_classifier",
    "load_clip",
    "load_reference",
]


class Reference(NamedTuple):
    """Classifier features of Fashion-MNIST's 10,000 test images."""

    mean: Tensor
    """[64] float64."""
    covariance: Tensor
    """[64, 64] float64, unbiased."""
    num_images: int
    """Number of images behind mean and covariance."""
    features: Tensor
    """[2000, 64] float32: a class-balanced subset, for density and coverage."""


def evaluation_prompts(num: int) -> list[tuple[str, int]]:
    """The first `num` evaluation prompts, each with its class index; classes take turns, so any 10 k are balanced.

    Raises ConfigError where there are not so many.
    """
    lines = PROMPTS_FILE.read_text(encoding="utf-8").splitlines()
    if not 1 <= num <= len(lines):
        raise ConfigError(
            f"evaluation.num_images: {num}; the built-in problem has {len(lines)} evaluation prompts: set {len(lines)} "
            "or less"
        )
    return [(line, index % len(CLASS_NAMES)) for index, line in enumerate(lines[:num])]


def load_classifier() -> Classifier:
    """The built-in classifier in float32: images [B, 3, 32, 32] in [0, 1] to logits; `.features` gives [B, 64]."""
    from ddil_dist.builtin.classifier import read_classifier

    return read_classifier(CLASSIFIER_DIR)


def load_reference() -> Reference:
    """The test set's feature statistics, which Frechet distance, density and coverage compare with."""
    from safetensors.torch import load_file

    state = load_file(REFERENCE_FILE)
    return Reference(state["mean"], state["covariance"], int(state["count"]), state["features"].float())


def load_clip() -> tuple[CLIP, Callable[..., Any], Callable[..., Any]]:
    """The built-in OpenCLIP model: (model, preprocess of a PIL image, tokenizer of texts), by open_clip's own API."""
    import open_clip

    name = f"local-dir:{CLIP_DIR}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)
