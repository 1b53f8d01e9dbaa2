"""The shipped folder as a whole: small, complete, and readable without torch."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.io import ImageReadMode, decode_image

from ddil_dist.builtin import (
    ASSETS_DIR,
    CLASS_NAMES,
    DATA_FILE,
    MODEL_CARD,
    load_classifier,
    load_clip,
    load_reference,
)
from ddil_dist.builtin.captions import NOUNS
from ddil_dist.builtin.classifier import batched_features
from ddil_dist.builtin.training.quality import frechet_to_reference


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return pq.read_table(DATA_FILE)


def class_of(text: str) -> int:
    """The class whose longest noun occurs in the text."""
    found = [(len(noun), c) for c, nouns in enumerate(NOUNS) for noun in nouns if f" {noun} " in f" {text} "]
    return max(found)[1]


@pytest.fixture(scope="module")
def shipped(table: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
    """The shipped images [4096, 3, 32, 32] in [0, 1] and their classes, read from the captions."""
    pngs = [row["bytes"] for row in table["image"].to_pylist()]
    decoded = [decode_image(torch.frombuffer(bytearray(png), dtype=torch.uint8), ImageReadMode.RGB) for png in pngs]
    return torch.stack(decoded) / 255, torch.tensor([class_of(text) for text in table["text"].to_pylist()])


def test_all_assets_together_stay_small() -> None:
    assert sum(f.stat().st_size for f in ASSETS_DIR.rglob("*") if f.is_file()) <= 12e6


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, ddil_dist.builtin as b; b.evaluation_prompts(10); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_model_card_says_what_matters() -> None:
    card = MODEL_CARD.read_text(encoding="utf-8")
    for needed in ("MIT License", "Zalando", "ddil_dist.builtin.build", "guidance", "FID"):
        assert needed in card


def test_parquet_has_the_layout_of_image_datasets(table: pa.Table) -> None:
    image = table.schema.field("image").type
    assert {image.field(k).name: image.field(k).type for k in range(2)} == {"bytes": pa.binary(), "path": pa.string()}
    assert table.schema.field("text").type == pa.string()
    assert table.num_rows == 4096


def test_parquet_is_balanced_and_the_classifier_agrees_with_its_captions(
    shipped: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images, classes = shipped
    assert torch.bincount(classes, minlength=10).tolist() == [410] * 6 + [409] * 4
    with torch.no_grad():
        predicted = load_classifier()(images[::4]).argmax(dim=1)
    assert (predicted == classes[::4]).double().mean() > 0.93


def test_the_classifier_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"float images of shape \[B, 3, 32, 32\]"):
        load_classifier()(torch.zeros(1, 1, 28, 28))


def test_reference_statistics_are_those_of_real_images(shipped: tuple[torch.Tensor, torch.Tensor]) -> None:
    mean, covariance, num_images, features = load_reference()
    assert num_images == 10_000
    assert mean.dtype == covariance.dtype == torch.float64
    assert torch.allclose(covariance, covariance.T, rtol=0, atol=1e-12)
    assert frechet_to_reference(features, mean, covariance) < 1.0
    classifier = load_classifier()
    assert classifier.num_features == features.shape[1] == 64
    real = frechet_to_reference(batched_features(classifier, shipped[0][::4]), mean, covariance)
    dimmed = frechet_to_reference(batched_features(classifier, shipped[0][::4] * 0.5), mean, covariance)
    assert real < 2.0 < dimmed


def test_clip_prefers_the_right_caption(shipped: tuple[torch.Tensor, torch.Tensor]) -> None:
    from torchvision.transforms.functional import to_pil_image

    model, preprocess, tokenize = load_clip()
    images, classes = shipped[0][:100], shipped[1][:100]
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(to_pil_image(x)) for x in images]))
        text = model.encode_text(tokenize([f"a photo of {nouns[0]}" for nouns in NOUNS]))
    image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
    assert ((image @ text.T).argmax(dim=1) == classes).double().mean() > 0.8
    assert len(CLASS_NAMES) == len(text)


def test_no_asset_names_the_directory_it_was_built_in() -> None:
    for path in sorted(ASSETS_DIR.rglob("*.json")):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path
