"""Shared fixtures: a tiny pipeline of the real classes, its data, and a configuration that uses both."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from ddil_dist.config import RunConfig, load_config

DEFAULT_TIMEOUT_S = 300.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process is left alone with them at the end: those that wait for whole runs."""

    def order(item: pytest.Item) -> tuple[float, bool]:
        timeout = item.get_closest_marker("timeout")
        return -float(timeout.args[0] if timeout else DEFAULT_TIMEOUT_S), "integration" not in item.path.parts

    items.sort(key=order)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `pipeline/` and `data.parquet`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing diffusers and transformers warns of their own deprecations
        from tests.support.tiny import save_tiny_data, save_tiny_pipeline

        directory = tmp_path_factory.mktemp("tiny")
        save_tiny_pipeline(directory / "pipeline")
        save_tiny_data(directory / "data.parquet")
    return directory


@pytest.fixture
def tiny_overrides(tiny_directory: Path, tmp_path: Path) -> list[str]:
    """Overrides of a run that takes seconds."""
    return [
        f"run.directory={tmp_path / 'runs'}",
        "run.name=tiny",
        "run.execution=inline",
        f"teacher.pipeline={tiny_directory / 'pipeline'}",
        f"data.path={tiny_directory / 'data.parquet'}",
        "teacher.steps=8",
        "student.steps=4",
        "rollout.batch_size=8",
        "rollout.insert_batch=8",
        "learner.updates=6",
        "learner.batch_size=8",
        "learner.publish_every=2",
        "learner.checkpoint_every=3",
        "replay.min_size=16",
        "replay.error_buffer=64",
        "replay.samples_per_insert=2",
        "evaluation.num_images=0",
    ]


@pytest.fixture
def tiny_config(tiny_overrides: list[str]) -> RunConfig:
    return load_config(None, tiny_overrides)
