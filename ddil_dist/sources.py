"""Where a pipeline and its data are: names to paths, checked without loading anything. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from ddil_dist.builtin import DATA_FILE, PIPELINE_DIR
from ddil_dist.config import BUILTIN, DataConfig
from ddil_dist.errors import ConfigError, DataError

SUPPORTED_PIPELINES = ("StableDiffusionPipeline",)


def resolve_pipeline(name: str) -> str:
    """What `from_pretrained` is given: the built-in directory, or the name as it is.

    Raises ConfigError for a local directory that holds no pipeline of a supported class. A hub id passes.
    """
    if name == BUILTIN:
        return str(PIPELINE_DIR)
    path = Path(name)
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise ConfigError(
                f"teacher.pipeline: no directory at {name!r}; give a pipeline directory, a hub id (owner/name), or "
                f"{BUILTIN!r}"
            )
        return name
    index = path / "model_index.json"
    if not index.is_file():
        raise ConfigError(
            f"teacher.pipeline: {name!r} is not a diffusers pipeline (no model_index.json); save one there with "
            "pipeline.save_pretrained"
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"teacher.pipeline: {index} is not valid JSON: {error}") from error
    if kind not in SUPPORTED_PIPELINES:
        raise ConfigError(f"teacher.pipeline: {name!r} is a {kind}; supported: {', '.join(SUPPORTED_PIPELINES)}")
    return name


def resolve_data(config: DataConfig) -> Path:
    """Where the configured data lies; raises DataError if nothing is there."""
    if config.path == BUILTIN:
        return DATA_FILE
    path = Path(config.path)
    if not path.exists():
        raise DataError(f"data.path: no file or directory at {config.path!r}; give Parquet, or {BUILTIN!r}")
    return path
