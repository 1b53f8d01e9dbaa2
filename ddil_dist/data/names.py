"""Which columns, or fields, hold images and captions: as configured, or the one of the usual names that fits."""

from __future__ import annotations

import logging
from collections.abc import Collection

from ddil_dist.config import DataConfig
from ddil_dist.errors import DataError

USUAL = {
    "image_column": ("image", "jpg", "png", "img"),
    "text_column": ("text", "caption", "txt", "prompt"),
}
"""By the key of `data` that names the column; the first is the key's default."""

logger = logging.getLogger(__name__)


def choose_columns(where: str, columns: Collection[str], config: DataConfig) -> tuple[str, str]:
    """The columns of images and of captions; raises DataError, naming what there is, where one is not to be found."""
    chosen = {key: choose(key, columns, config) for key in USUAL}
    missing = [_missing(key, columns, config) for key, column in chosen.items() if column is None]
    if missing:
        raise DataError(f"data.path: {where!r} has {', '.join(missing)}; its columns are {list(columns)}")
    for key, column in chosen.items():
        if column != getattr(config, key):
            logger.warning("data.%s: %s has no column %r; %r is taken", key, where, getattr(config, key), column)
    return str(chosen["image_column"]), str(chosen["text_column"])


def choose(key: str, columns: Collection[str], config: DataConfig) -> str | None:
    """The column that a key of `data` names; where it is left at its default, the only one of a usual name."""
    wanted: str = getattr(config, key)
    if wanted in columns:
        return wanted
    usual = USUAL[key]
    found = [name for name in usual if name in columns] if wanted == usual[0] else []
    return found[0] if len(found) == 1 else None


def _missing(key: str, columns: Collection[str], config: DataConfig) -> str:
    several = [name for name in USUAL[key] if name in columns]
    choice = f", and {' and '.join(map(repr, several))} would do: name one" if len(several) > 1 else ""
    return f"no column {getattr(config, key)!r} (data.{key}{choice})"
