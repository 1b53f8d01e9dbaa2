"""`evaluate_images` composes the metrics; the built-in networks tell real images from noise."""

from __future__ import annotations

import pytest
import torch

from ddil_dist import builtin
from ddil_dist.errors import DataError
from ddil_dist.metrics.diversity import density_coverage
from ddil_dist.metrics.evaluate import (
    Batch,
    EvaluationNetworks,
    Measurements,
    builtin_networks,
    evaluate_images,
    measure_images,
    metric_differences,
    metric_intervals,
    metric_values,
)
from ddil_dist.metrics.features import ClassifierFeatures
from ddil_dist.metrics.fid import GaussianStatistics, frechet_distance

needs_assets = pytest.mark.skipif(
    not (builtin.REFERENCE_FILE.is_file() and (builtin.CLIP_DIR / "open_clip_model.safetensors").is_file()),
    reason="the built-in assets are not built",
)


class Means(torch.nn.Module):
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def images_of(num: int, seed: int) -> torch.Tensor:
    return torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_each_metric_is_that_of_its_module() -> None:
    images, real = images_of(20, 0), images_of(30, 1).mean(dim=(2, 3))
    networks = EvaluationNetworks(
        features=ClassifierFeatures(Means()),
        reference=GaussianStatistics.of(real),
        reference_features=real,
        classify=lambda batch: torch.tensor([[1.0, 0.0]]).repeat(len(batch), 1),
    )
    metrics = evaluate_images(images, ["a"] * 20, [0] * 15 + [1] * 5, networks)
    features = images.mean(dim=(2, 3))
    spread = density_coverage(real, features)
    assert metrics == pytest.approx(
        {
            "fid": frechet_distance(GaussianStatistics.of(real), GaussianStatistics.of(features)),
            "agreement": 0.75,
            "density": spread.density,
            "coverage": spread.coverage,
        }
    )


def test_metrics_without_their_networks_are_left_out() -> None:
    networks = EvaluationNetworks(features=ClassifierFeatures(Means()), classify=lambda batch: batch[:, :, 0, 0])
    assert evaluate_images(images_of(3, 0), ["a", "b", "c"], None, networks) == {}


def test_an_image_that_is_not_finite_is_refused() -> None:
    images = images_of(3, 0)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="pixel is not finite"):
        evaluate_images(images, ["a", "b", "c"], None, EvaluationNetworks(features=ClassifierFeatures(Means())))


def test_images_and_captions_must_match() -> None:
    with pytest.raises(DataError, match="3 images for 2 captions"):
        evaluate_images(images_of(3, 0), ["a", "b"], None, EvaluationNetworks(features=ClassifierFeatures(Means())))


@needs_assets
def test_the_builtin_networks_prefer_real_images_to_noise() -> None:
    import io

    import pyarrow.parquet
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    rows = pyarrow.parquet.read_table(builtin.DATA_FILE).slice(0, 200).to_pylist()
    real = (
        torch.stack(
            [pil_to_tensor(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
        ).float()
        / 255
    )
    captions = [row["text"] for row in rows]
    networks = builtin_networks()
    of_real = evaluate_images(real, captions, None, networks)
    of_noise = evaluate_images(
        torch.rand(real.shape, generator=torch.Generator().manual_seed(0)), captions, None, networks
    )
    assert of_real["fid"] < of_noise["fid"] / 5
    assert of_real["clip_score"] > of_noise["clip_score"]
    assert of_real["coverage"] > of_noise["coverage"]


def test_intervals_and_paired_differences_are_of_the_metrics_themselves() -> None:
    images, real = images_of(60, 0), images_of(80, 1).mean(dim=(2, 3))
    networks = EvaluationNetworks(
        features=ClassifierFeatures(Means()),
        reference=GaussianStatistics.of(real),
        reference_features=real,
        classify=lambda batch: batch[:, :2, 0, 0],
    )

    def measured(of: torch.Tensor) -> Measurements:
        halves = [Batch(part, ["a"] * len(part), [0] * len(part)) for part in torch.split(of, 40)]
        return measure_images(halves, networks)

    found, same = measured(images), measured(images.clone())
    values, intervals = metric_values(found, networks), metric_intervals(found, networks)
    assert values == pytest.approx(evaluate_images(images, ["a"] * 60, [0] * 60, networks))
    assert set(values) == set(intervals) == {"fid", "agreement", "density", "coverage"}
    for key, interval in intervals.items():
        assert interval.value == pytest.approx(values[key])
        assert interval.low <= values[key] <= interval.high
    paired = metric_differences(found, same, networks)
    assert all((each.value, each.low, each.high) == (0, 0, 0) for each in paired.values())
    brighter = metric_differences(measured((images + 0.3).clamp(0, 1)), found, networks)
    assert brighter["fid"].low > 0
    assert set(metric_intervals(measured(images[:10]), networks)) == {"agreement"}, "ten images are too few for groups"
