"""Data sets on the Hugging Face hub: the Parquet files of one split, through the hub's own cache."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from ddil_dist.config import DataConfig
from ddil_dist.data.layout import Layout
from ddil_dist.errors import DataError

CONVERTED = "refs/convert/parquet"
"""The branch where the hub keeps a data set of another format as Parquet."""


def fetch_from_hub(config: DataConfig) -> Layout:
    """The `data.split` of `owner/name`; raises DataError where the hub has none, or cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    pattern = [f"{config.split}-*.parquet", f"*/{config.split}-*.parquet", f"*/{config.split}/*.parquet"]
    problem: Exception | None = None
    for revision in (None, CONVERTED):
        try:
            home = Path(snapshot_download(config.path, repo_type="dataset", revision=revision, allow_patterns=pattern))
        except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
            problem = error
            continue
        # What lies there besides was fetched for another split: the cache keeps all of a revision in one place.
        files = [
            file
            for file in sorted(home.rglob("*.parquet"))
            if any(fnmatch(file.relative_to(home).as_posix(), shape) for shape in pattern)
        ]
        if files:
            return Layout(home, "parquet", tuple(files))
    raise DataError(
        f"data.path: {config.path!r} is no directory here, and on the hub no data set with Parquet files of a split "
        f"{config.split!r}" + (f": {problem}" if problem else "")
    )
