"""Every recipe, a few updates from its beginning to a stock student, on a tiny pipeline of the class that it names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ddil_dist.config import load_config, resolve_stages
from ddil_dist.launch.__main__ import main

RUNS = Path(__file__).parents[2] / "deploy" / "runs"
RECIPES = sorted(path.stem for path in RUNS.glob("*.yaml"))
VARIANTS = {"builtin_pd_backward", "builtin_pd_forward", "builtin_pd_linear", "builtin_pd_teacher", "sd15_pd",
            "builtin_lcm", "ssd1b_dmd2", "ssd1b_dmd2_reflected"}  # fmt: skip
"""Recipes that share all of their code with another; they run among the slow tests."""
SMALL = {
    "run": {"execution": "inline"},
    "teacher": {"precision": "float32"},
    "rollout": {"batch_size": 4, "student_batch_size": None, "insert_batch": 4, "precision": "float32", "num_gpus": 0},
    "learner": {
        "updates": 2,
        "batch_size": 4,
        "micro_batch_size": None,
        "workers": 1,
        "num_gpus": 0,
        "mixed_precision": "no",
        "sharding": "none",
        "publish_every": 1,
        "sample_every": 0,
        "keep_best": None,
    },
    "replay": {"capacity": 256, "min_size": 4, "error_buffer": 64.0, "samples_per_insert": 2.0},
    "evaluation": {"num_images": 0},
}


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.support.tiny import save_tiny_sdxl_pipeline

        path = tmp_path_factory.mktemp("tiny_sdxl") / "pipeline"
        save_tiny_sdxl_pipeline(path)
    return path


def shrink(section: dict[str, Any], pipeline: Path) -> None:
    """Make a recipe, or a stage of one, small where it says how large it is."""
    for name, small in SMALL.items():
        if name in section:
            section[name] |= {key: value for key, value in small.items() if key in section[name]}
    if "teacher" in section and "pipeline" in section["teacher"]:
        section["teacher"]["pipeline"] = str(pipeline)
    for stage in (section.get("curriculum") or {}).get("stages", []):
        shrink(stage, pipeline)


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in RECIPES]
)
def test_a_recipe_runs_from_end_to_end(recipe: str, tiny_directory: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((RUNS / f"{recipe}.yaml").read_text(encoding="utf-8"))
    pipeline = tiny_sdxl if recipe.startswith(("sdxl", "ssd1b")) else tiny_directory / "pipeline"
    for name, small in SMALL.items():
        raw[name] = raw.get(name, {}) | small
    raw["run"] |= {"name": "small", "directory": str(tmp_path)}
    raw["teacher"] |= {"pipeline": str(pipeline)}
    raw["data"] = {"path": str(tiny_directory / "data.parquet")}
    shrink(raw, pipeline)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")

    assert main(["--config", str(path)]) == 0

    from diffusers import DiffusionPipeline

    config = resolve_stages(load_config(path))[-1]
    student = DiffusionPipeline.from_pretrained(tmp_path / "small" / "student")
    student.set_progress_bar_config(disable=True)
    scale = config.evaluation_guidance_scale
    images = student("a red square", num_inference_steps=config.student.steps, guidance_scale=scale, output_type="np")
    assert np.isfinite(images.images).all()
    assert images.images.std() > 0
