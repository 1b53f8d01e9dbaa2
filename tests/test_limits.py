"""Limits from latents: quantiles by channel against NumPy's, and a snippet that is a configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ddil_dist.config import ReflectThresholding, load_config
from ddil_dist.limits import POSITIONS, LatentMagnitudes, main
from tests.support.problem import tiny_problem


def test_limits_of_small_latents_are_the_exact_quantiles() -> None:
    generator = np.random.default_rng(0)
    latents = (generator.standard_normal((40, 3, 4, 4)) * [[[[1.0]], [[2.0]], [[5.0]]]]).astype(np.float32)
    magnitudes = LatentMagnitudes()
    magnitudes.add(latents[:25])
    magnitudes.add(latents[25:])
    by_channel = np.abs(latents).transpose(1, 0, 2, 3).reshape(3, -1)
    assert magnitudes.limits(0.9) == pytest.approx(np.quantile(by_channel, 0.9, axis=1).tolist(), rel=1e-6)
    assert magnitudes.limits(1.0) == by_channel.max(1).tolist()


def test_limits_of_large_latents_are_estimated_and_the_largest_value_is_never_missed() -> None:
    generator = np.random.default_rng(1)
    latents = generator.standard_normal((60, 2, 48, 48)).astype(np.float32)
    latents[7, 1, 3, 3] = -30.0
    assert latents[0, 0].size > POSITIONS
    magnitudes = LatentMagnitudes()
    magnitudes.add(latents)
    assert magnitudes.limits(0.95) == pytest.approx([1.96, 1.96], abs=0.03)  # |N(0, 1)|'s
    assert magnitudes.limits(1.0)[1] == 30.0


def test_the_command_prints_a_section_that_holds_the_data(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"teacher.pipeline={tiny_directory / 'pipeline'}", f"data.path={tiny_directory / 'data.parquet'}"]
    assert main(["--quantile", "1", "--images", "20", "--batch-size", "6", *places]) == 0
    out, err = capsys.readouterr()
    assert "20/20" in err
    (tmp_path / "limits.yaml").write_text(out)
    section = load_config(tmp_path / "limits.yaml").thresholding
    assert isinstance(section, ReflectThresholding)
    data = tiny_problem(tiny_directory).forward_data(seed=0)
    latents, _ = data.next(20)
    largest = latents.abs().amax((0, 2, 3))
    assert section.limit == pytest.approx(largest.tolist(), rel=1e-3)
    # Rounding to four digits may cut the largest by a little; all else is inside and stays.
    folded = section.threshold()(latents)
    assert torch.allclose(folded, latents, atol=2e-3 * float(largest.max()))
    assert int((folded != latents).sum()) <= 4


@pytest.mark.parametrize("arguments", [["--quantile", "0"], ["--quantile", "1.5"], ["--images", "0"]])
def test_numbers_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "must be " in capsys.readouterr().err


def test_data_that_are_not_there_are_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data.path=/nowhere.parquet"]) == 2
    assert capsys.readouterr().err.startswith("ddil_dist: data.path: no file or directory at '/nowhere.parquet'")
