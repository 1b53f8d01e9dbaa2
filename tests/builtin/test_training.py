"""The build's own machinery, on inputs of a few bytes: nothing here trains a shipped network."""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddil_dist.builtin import ASSETS_DIR
from ddil_dist.builtin.build import STAGES, main
from ddil_dist.builtin.training.dataset import balanced_indices, load_split
from ddil_dist.builtin.training.loop import Plan, fit
from ddil_dist.builtin.training.measure import read_quality, write_quality
from ddil_dist.builtin.training.quality import frechet_distance, grid_timesteps, image_grid
from ddil_dist.builtin.training.stages import LAST_FILES

PLAN = Plan(updates=12, batch_size=4, lr=0.1, warmup=2, fall=0.5, ema_decay=0.5, seed=5)


def train(checkpoint: Path, plan: Plan, *, stop_at: int | None = None) -> Tensor:
    """Fit a linear layer to noise; optionally fail at an update. Returns the averaged weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    calls = 0

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if stop_at is not None and calls > stop_at:
            raise InterruptedError
        error: Tensor = model(data[indices]) - torch.randn(len(indices), 1, generator=generator)
        return error.square().mean()

    cpu = torch.device("cpu")
    fit(model, loss, plan=plan, num_samples=20, checkpoint=checkpoint, device=cpu, checkpoint_every=3)
    return model.weight.detach()


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    factors = [PLAN.lr_factor(update) for update in range(12)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert PLAN.lr_factor(12) == 0


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        train(tmp_path / "resumed.pt", PLAN, stop_at=7)
    assert int(torch.load(tmp_path / "resumed.pt", weights_only=True)["update"]) == 6
    assert torch.equal(train(tmp_path / "resumed.pt", PLAN), train(tmp_path / "whole.pt", PLAN))


def test_a_training_cut_short_before_its_fall_equals_one_planned_short(tmp_path: Path) -> None:
    short = replace(PLAN, updates=8)
    with pytest.raises(InterruptedError):
        train(tmp_path / "cut.pt", PLAN, stop_at=4)
    assert torch.equal(train(tmp_path / "cut.pt", short), train(tmp_path / "short.pt", short))


def write_idx(path: Path, shape: tuple[int, ...], data: bytes) -> None:
    sizes = b"".join(n.to_bytes(4, "big") for n in shape)
    path.write_bytes(gzip.compress(b"\x00\x00\x08" + bytes([len(shape)]) + sizes + data))


def test_images_are_padded_by_two_black_pixels(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", (2, 28, 28), bytes([7]) * (2 * 28 * 28))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", (2,), bytes([3, 1]))
    split = load_split(tmp_path, "train")
    assert split.labels.tolist() == [3, 1]
    assert split.images.shape == (2, 1, 32, 32)
    assert split.images[:, :, 2:30, 2:30].unique().tolist() == [7]
    assert int(split.images.sum()) == 7 * 2 * 28 * 28


def test_a_missing_dataset_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*--data"):
        main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])


def test_balanced_indices_take_classes_in_turn() -> None:
    labels = torch.arange(10).repeat_interleave(5)
    assert balanced_indices(labels, 12) == [0, 1, 5, 6, 10, 15, 20, 25, 30, 35, 40, 45]


def test_frechet_distance_of_diagonal_gaussians() -> None:
    a, b = torch.tensor([1.0, 4.0]).double(), torch.tensor([9.0, 4.0]).double()
    shift = torch.tensor([3.0, 0.0]).double()
    zero = torch.zeros(2).double()
    assert frechet_distance(shift, a.diag(), zero, b.diag()) == pytest.approx(9 + (1 - 3) ** 2)


def test_the_grid_is_the_students_grid() -> None:
    assert grid_timesteps(4) == [999, 749, 500, 250]
    assert len(grid_timesteps(32)) == 32


def test_image_grid_reads_row_by_row() -> None:
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert image_grid(images, columns=2).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_every_stage_is_done_in_the_shipped_assets() -> None:
    assert tuple(LAST_FILES) == STAGES
    assert [stage for stage, name in LAST_FILES.items() if not (ASSETS_DIR / name).is_file()] == []


def test_the_shipped_quality_reads_back_and_meets_its_bar(tmp_path: Path) -> None:
    quality = read_quality(ASSETS_DIR / "quality.json")
    write_quality(quality, tmp_path / "copy.json")
    assert read_quality(tmp_path / "copy.json") == quality
    best, four = (
        next(s for s in quality.scores if (s.steps, s.guidance_scale) == (steps, quality.best_guidance))
        for steps in (32, 4)
    )
    assert best.agreement > quality.classifier_accuracy - 0.05
    assert best.fid < four.fid / 2
