"""CLIP score with a model whose similarities are known, and with a real OpenCLIP architecture from a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ddil_dist.errors import EnvironmentFailure
from ddil_dist.metrics.clip_score import ClipScorer

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class AngleModel(torch.nn.Module):
    """Embeds an image at an angle of its red level (255 is 90 degrees), and every caption at 0."""

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        angle = pixels[:, 0, 0, 0] / 255 * math.pi / 2
        return 7 * torch.stack([angle.cos(), angle.sin()], dim=1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.5, 0.0]]).repeat(len(tokens), 1)


def red_level(image: Image.Image) -> torch.Tensor:
    return torch.full((1, 1, 1), float(image.getpixel((0, 0))[0]))  # type: ignore[index]


def test_score_is_the_mean_cosine_of_image_and_caption() -> None:
    scorer = ClipScorer(
        AngleModel(), preprocess=red_level, tokenizer=lambda texts: torch.zeros(len(texts), 1), name="angle"
    )
    images = torch.zeros(3, 3, 2, 2)
    images[1], images[2] = 85 / 255, 1.0  # 30 and 90 degrees
    similarities = scorer.similarities(images, ["a", "b", "c"], batch_size=2)
    assert similarities.tolist() == pytest.approx([1, math.cos(math.pi / 6), 0], abs=1e-6)
    assert float(scorer.similarities(images, ["a", "b", "c"]).mean()) == pytest.approx(
        (1 + math.cos(math.pi / 6)) / 3, abs=1e-6
    )


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """An untrained OpenCLIP model in the layout of `local-dir:`."""
    torch.manual_seed(0)
    mean_std = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": mean_std}))
    save_file(open_clip.model.CLIP(**TINY).state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def test_an_open_clip_folder_scores_as_open_clip_itself_does(tiny_folder: Path) -> None:
    name = f"local-dir:{tiny_folder}"
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    captions = ["a coat", "a bag", "an ankle boot"]
    model, preprocess = open_clip.create_model_from_pretrained(name)
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = torch.stack([preprocess(Image.fromarray(array)) for array in arrays])
    with torch.no_grad():
        similarity = (
            model.encode_image(pixels, normalize=True)
            @ model.encode_text(open_clip.get_tokenizer(name)(captions), normalize=True).T
        )
    scorer = ClipScorer.load(name)
    assert scorer.name == name
    assert scorer.similarities(images, captions, batch_size=2).tolist() == pytest.approx(
        similarity.diagonal().tolist(), abs=1e-5
    )


def test_an_unknown_model_is_an_environment_failure_that_names_it() -> None:
    with pytest.raises(EnvironmentFailure, match=r"no-such-model.*list_pretrained"):
        ClipScorer.load("no-such-model", "nowhere")
