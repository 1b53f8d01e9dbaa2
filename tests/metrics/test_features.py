"""Feature networks: rounding, batching, the Inception adapter and its refusals."""

from __future__ import annotations

import urllib.error
from typing import Any

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as port

from ddil_dist.errors import EnvironmentFailure
from ddil_dist.metrics.features import ClassifierFeatures, InceptionFeatures, extract_features, to_uint8


class Means(torch.nn.Module):
    """A classifier whose features are the channel means."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def test_images_round_to_the_nearest_level_and_clamp() -> None:
    assert to_uint8(torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.2])).tolist() == [
        0, 0, 0, 1, 255, 255,
    ]  # fmt: skip


def test_features_of_batches_are_those_of_the_whole() -> None:
    images = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    features = extract_features(images, ClassifierFeatures(Means()), batch_size=3)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, images.mean(dim=(2, 3)).double())


def test_inception_reads_rounded_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    network = InceptionFeatures()
    levels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = network(levels.float() / 255 + 0.001)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, network._network(levels))
    assert not torch.allclose(features[0], features[1])


def test_inception_without_network_names_the_file_and_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(port, "load_state_dict_from_url", offline)
    with pytest.raises(
        EnvironmentFailure, match=r"no route to host.*weights-inception-2015-12-05-6726825d.pth.*put it"
    ):
        InceptionFeatures()


def test_inception_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(EnvironmentFailure, match=r"torch_fidelity.*pip install 'ddil_dist\[evaluation\]'"):
        InceptionFeatures()
