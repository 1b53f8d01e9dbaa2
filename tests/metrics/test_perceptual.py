"""Perceptual distance against an independent computation, and diversity by hand."""

from __future__ import annotations

import itertools
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from ddil_dist.builtin import DATA_FILE, load_classifier
from ddil_dist.config import DataConfig
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.errors import ConfigError
from ddil_dist.metrics.perceptual import ClassifierDistance, Lpips, diversity
from tests.support.problem import CPU


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None).eval()
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save(network.state_dict(), path)
    return network, path


def by_hand(network: torch.nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Eq. 1 of Zhang et al. 2018, with the heads that torchmetrics ships."""
    path = files("torchmetrics.functional.image") / "lpips_models" / "alex.pth"
    heads = torch.load(str(path), map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((2 * images - 1 - shift[:, None, None]) / scale[:, None, None] for images in (a, b))
    total, layer = torch.zeros(len(a)), 0
    for number, module in enumerate(network.features):
        x, y = module(x), module(y)
        if number in (1, 4, 7, 9, 11):
            unit = [part / (part.square().sum(1, keepdim=True).sqrt() + 1e-8) for part in (x, y)]
            weight = heads[f"lin{layer}.model.1.weight"]
            total += ((unit[0] - unit[1]).square() * weight).sum(1).mean((1, 2))
            layer += 1
    return total


@torch.no_grad()
def test_lpips_is_that_of_the_paper(alexnet: tuple[torch.nn.Module, Path]) -> None:
    network, path = alexnet
    a, b = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = Lpips(path, device=CPU)(a, b)
    torch.testing.assert_close(found, by_hand(network, a, b), rtol=1e-3, atol=1e-6)
    assert float(found.min()) > 0
    assert float(Lpips(path, device=CPU)(a, a).max()) == 0


def test_other_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(ConfigError, match=r"^--lpips: .* does not hold AlexNet's .*alexnet-owt-7be5be79.pth$"):
            Lpips(tmp_path / name, device=CPU)


def test_diversity_is_the_mean_over_pairs_and_then_over_prompts() -> None:
    class Apart:
        name = "by hand"

        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean((1, 2, 3))

    levels = [[0.0, 0.5, 1.0], [0.2, 0.2, 0.2], [0.0, 0.0, 1.0]]
    prompts = [torch.stack([torch.full((3, 2, 2), level) for level in row]) for row in levels]
    found = diversity(prompts, Apart())
    means = [sum(abs(x - y) for x, y in itertools.combinations(row, 2)) / 3 for row in levels]
    assert found.value == pytest.approx(sum(means) / 3)
    assert found.low < found.value < found.high


def test_the_built_in_distance_tells_kinds_of_clothes_apart() -> None:
    """Real images of several captions lie further apart than copies of one that are shifted by a pixel."""
    data = ImageTextData.open(DataConfig(path=str(DATA_FILE)), image_size=32)
    images = (data.images([0, 500, 1000, 1500])[0] + 1) / 2
    distance = ClassifierDistance(load_classifier(), device=CPU)
    assert float(distance(images, images).max()) == 0
    assert float(distance(images, images.roll(1, 3)).mean()) < float(distance(images, images.roll(1, 0)).mean())
