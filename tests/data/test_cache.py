"""Latents and captions encoded once: what a run draws from them is what it would have encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddil_dist.cache import main
from ddil_dist.config import load_config, resolve_stages
from ddil_dist.data.cache import MANIFEST, LatentCache
from ddil_dist.errors import ConfigError
from ddil_dist.launch.__main__ import main as launch
from ddil_dist.problem import ImitationProblem
from tests.data.support import encoded, write_rows
from tests.support.problem import CPU
from tests.support.tiny import save_tiny_pipeline

NUM = 7


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> list[str]:
    path = tmp_path_factory.mktemp("cache") / "d.parquet"
    rows: list[tuple[Any, Any]] = [(encoded((30 * i, 255 - 30 * i, 40)), f"row {i}") for i in range(NUM)]
    write_rows(path, [*rows[:3], (b"broken", "x"), *rows[3:]])
    return [
        f"data.path={path}",
        f"teacher.pipeline={tiny_directory / 'pipeline'}",
        "teacher.steps=8",
        "student.steps=4",
    ]


@pytest.fixture(scope="module")
def cache(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "cache"
    assert main(["--output", str(output), "--batch-size", "3", *overrides]) == 0
    return output


def problem_of(overrides: list[str], *more: str) -> ImitationProblem:
    return ImitationProblem.create(load_config(None, [*overrides, *more]), CPU)


def test_a_stream_from_the_cache_is_the_stream_without(overrides: list[str], cache: Path) -> None:
    plain, cached = problem_of(overrides), problem_of(overrides, f"data.cache={cache}")
    ours, theirs = (problem.forward_data(seed=5).next(20) for problem in (cached, plain))
    assert ours[1] == theirs[1]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)  # encoded in other company


def test_neither_images_nor_captions_are_encoded_again(
    overrides: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(overrides, f"data.cache={cache}")
    wanted = problem_of(overrides).encoder.encode(["row 2", "", "row 6"])
    for pipeline, method in ((problem.teacher.pipeline.vae, "encode"), (problem.teacher.pipeline, "encode_prompt")):
        monkeypatch.setattr(pipeline, method, lambda *_, **__: pytest.fail("encoded"))
    assert problem.data_status() is None
    latents, captions = problem.forward_data(seed=5).next(2 * (NUM + 1))
    assert len(latents) == len(captions)
    assert problem.data_status() == {
        "num_rows": NUM + 1,
        "num_skipped": 1,
        "skipped": {"an image that does not decode": 1},
    }, "as it was made"
    found = problem.encoder.encode(["row 2", "", "row 6"])
    torch.testing.assert_close(found.embeddings, wanted.embeddings)


def test_the_command_says_what_was_skipped(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "c"), *overrides]) == 0
    assert capsys.readouterr().out.endswith("8 rows, 1 skipped: 1 with an image that does not decode\n")
    made = LatentCache(tmp_path / "c", CPU)
    mean, std, captions = made.rows([3, 4])
    assert captions == ["row 3", "row 3"], "the broken row is the next usable one"
    assert sum(made.skipped.values()) == 1
    assert np.array_equal(mean[0], mean[1])
    assert (std > 0).all()


def test_a_cache_of_other_data_is_refused(overrides: list[str], cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"was made with data\.split='train', the run has 'test'"):
        problem_of(overrides, f"data.cache={cache}", "data.split=test")


def test_a_cache_of_another_pipelines_encoders_is_refused(overrides: list[str], cache: Path, tmp_path: Path) -> None:
    other = f"teacher.pipeline={save_tiny_pipeline(tmp_path / 'other', seed=1)}"
    with pytest.raises(
        ConfigError, match=r"made with the encoders of teacher\.pipeline='\w+', the run has '\w+'; make"
    ):
        problem_of(overrides, other, f"data.cache={cache}")


def test_every_stage_of_a_curriculum_draws_from_the_cache_of_the_first_teacher(
    overrides: list[str], cache: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "curriculum.yaml"
    file.write_text(
        "learner: {sample_every: 0, trackers: []}\n"
        "curriculum:\n"
        "  stages:\n"
        "    - {objective: {type: velocity}, student: {steps: 8}}\n"
        "    - {student: {steps: 4}}\n"
    )
    settings = [*tiny_overrides, *overrides, f"data.cache={cache}", "learner.updates=2", "learner.checkpoint_every=2"]
    assert launch(["--config", str(file), *settings]) == 0
    _, last = resolve_stages(load_config(file, settings))
    assert last.teacher.pipeline.endswith("tiny_stage_1/student")
    problem = ImitationProblem.create(last, CPU)
    assert problem.cache is not None
    plain = ImitationProblem.create(load_config(None, [*overrides]), CPU)
    latents, captions = problem.forward_data(seed=5).next(8)
    wanted, same = plain.forward_data(seed=5).next(8)
    assert captions == same
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-5)


def test_an_unfinished_cache_is_none(overrides: list[str], tmp_path: Path) -> None:
    main(["--output", str(tmp_path / "c"), *overrides])
    (tmp_path / "c" / MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"data\.cache: .* is no whole cache .*--output"):
        problem_of(overrides, f"data.cache={tmp_path / 'c'}")


def test_a_directory_with_other_files_is_left_alone(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    assert main(["--output", str(tmp_path), *overrides]) == 2
    assert "has other files in it" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_whole_cache_is_replaced_only_where_that_is_said(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "c"
    assert main(["--output", str(output), *overrides]) == 0
    before = (output / MANIFEST).stat().st_mtime_ns
    assert main(["--output", str(output), *overrides]) == 2
    assert "is a cache already; give another directory, or --overwrite" in capsys.readouterr().err
    assert (output / MANIFEST).stat().st_mtime_ns == before
    assert main(["--output", str(output), "--overwrite", *overrides]) == 0
    (output / MANIFEST).unlink()
    assert main(["--output", str(output), *overrides]) == 0, "what was interrupted is made anew"
