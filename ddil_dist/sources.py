"""Where a pipeline and its data are: names to paths, checked without loading anything. Imports no torch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddil_dist.builtin import DATA_FILE, PIPELINE_DIR
from ddil_dist.config import BUILTIN, DataConfig
from ddil_dist.data.places import FILE, check_remote, is_pattern, is_remote, local, matches
from ddil_dist.errors import ConfigError, DataError

SUPPORTED_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


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
        contents = json.loads(index.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"teacher.pipeline: {index} is not valid JSON: {error}") from error
    check_pipeline_class(name, contents)
    return name


def train_timesteps(pipeline: str) -> int | None:
    """How many timesteps the pipeline in a directory was trained on; None for a hub id, or where it does not say."""
    try:
        settings = json.loads((Path(pipeline) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        return int(settings["num_train_timesteps"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def check_hub(name: str, *, timeout_s: float) -> None:
    """Raises ConfigError for a pipeline that is no directory, and as a hub id neither in the cache nor to be had.

    The hub's own client would try again for half a minute, and speak of something else.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if name == BUILTIN or Path(name).exists() or isinstance(try_to_load_from_cache(name, "model_index.json"), str):
        return
    if any(os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    at = urlsplit(constants.ENDPOINT)
    assert at.hostname is not None
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        port = at.port or (80 if at.scheme == "http" else 443)
        socket.create_connection((at.hostname, port), timeout=timeout_s).close()
    except OSError as error:
        raise ConfigError(
            f"teacher.pipeline: no directory at {name!r}, nothing of that id in the hub's cache, and {at.hostname} is "
            f"not reached ({error}); give a directory, or download it where there is a network: hf download {name}"
        ) from error


def check_pipeline_class(name: str, index: Mapping[str, Any]) -> str:
    """The class that a pipeline's model_index.json names; raises ConfigError if it is not a supported one."""
    kind = index.get("_class_name")
    if kind not in SUPPORTED_PIPELINES:
        raise ConfigError(f"teacher.pipeline: {name!r} is a {kind}; supported: {', '.join(SUPPORTED_PIPELINES)}")
    return str(kind)


def resolve_data(config: DataConfig) -> str:
    """Where the configured data lies: a path, a pattern, an address, or a hub id, which is not looked up.

    Raises DataError if nothing is there, or if it could not be fetched.
    """
    if config.path == BUILTIN:
        return str(DATA_FILE)
    if is_remote(config.path):
        check_remote(config.path, pipe=config.pipe, download=config.download)
        return config.path
    name = local(config.path)
    if is_pattern(name):
        matches(name)
    elif not Path(name).exists() and (
        config.path.startswith((FILE, ".", "~")) or Path(name).is_absolute() or name.count("/") != 1
    ):
        raise DataError(
            f"data.path: no file or directory at {config.path!r}; give Parquet, tar shards, a saved data set, a folder "
            f"of images, a pattern or an address of them, a hub id (owner/name), or {BUILTIN!r}"
        )
    return name
