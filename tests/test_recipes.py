"""The run configurations that ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddil_dist.config import RunConfig, load_config

RUNS = Path(__file__).parents[1] / "deploy" / "runs"


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_loads(path: Path) -> None:
    assert load_config(path).learner.updates > 0


def test_embedded_default_is_written_out_truly() -> None:
    assert load_config(RUNS / "builtin_pd.yaml") == RunConfig()
