"""Sample strips: what is saved is what is read, in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ddil_dist.errors import DataError
from ddil_dist.report.samples import read_sample_grid, save_sample_rows


def test_images_come_back_as_saved(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0], images[0, 0, 0, 1] = -1.0, 2.0
    save_sample_rows(tmp_path, [("Teacher, 32 steps", images), ("b", images.flip(0).numpy())], ["x", "y", "<z>"])
    grid = read_sample_grid(tmp_path)
    assert grid is not None
    assert list(grid.captions) == ["x", "y", "<z>"]
    assert [row.label for row in grid.rows] == ["Teacher, 32 steps", "b"]
    wanted = np.clip(np.rint(images.numpy() * 255), 0, 255).transpose(0, 2, 3, 1)
    for row, order in zip(grid.rows, ([0, 1, 2], [2, 1, 0]), strict=True):
        np.testing.assert_array_equal(np.stack([np.asarray(image) for image in row.images]), wanted[order])
    assert (tmp_path / "samples" / "teacher_32_steps.png").is_file()


def test_saving_again_replaces_and_equal_names_do_not_collide(tmp_path: Path) -> None:
    images = np.zeros((1, 3, 2, 2))
    save_sample_rows(tmp_path, [("old", images)], ["x"])
    save_sample_rows(tmp_path, [("a b", images), ("a-b", images + 1), ("…", images)], ["x"])
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["a_b.png", "a_b_2.png", "grid.json", "row.png"]
    grid = read_sample_grid(tmp_path)
    assert grid is not None
    assert [row.images[0].getpixel((0, 0)) for row in grid.rows] == [(0, 0, 0), (255, 255, 255), (0, 0, 0)]


def test_a_strip_that_captions_do_not_divide_is_refused(tmp_path: Path) -> None:
    path = save_sample_rows(tmp_path, [("a", np.zeros((2, 3, 3, 3)))], ["x", "y"])
    path.write_text(path.read_text().replace('"y"', '"y", "z", "w"'))
    with pytest.raises(DataError, match="6 wide, which 4 images do not divide"):
        read_sample_grid(tmp_path)


def test_a_file_outside_the_folder_is_never_read(tmp_path: Path) -> None:
    path = save_sample_rows(tmp_path, [("a", np.zeros((1, 3, 3, 3)))], ["x"])
    (path.parent / "a.png").rename(tmp_path / "a.png")
    path.write_text(path.read_text().replace("a.png", "../a.png"))
    with pytest.raises(DataError, match="not readable"):
        read_sample_grid(tmp_path)
