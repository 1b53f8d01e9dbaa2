"""The image-text data, where it lies and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from PIL import ImageColor
from pydantic import Field, field_validator, model_validator

from ddil_dist.section import Positive, PositiveSeconds, Section

BUILTIN = "builtin"
"""Name of the pipeline, data set and prompts that ship with the package."""


class DataConfig(Section):
    """Image-text data for forward diffusion, and the prompts of rollouts."""

    path: str = Field(
        BUILTIN,
        description="'builtin', a file, a directory, a data set's id on the hub (owner/name), a pattern as "
        "/data/{00000..01210}.tar or /data/*.parquet, an address (s3://, gs://, https://), or pipe:COMMAND",
    )
    format: Literal["auto", "parquet", "arrow", "webdataset", "folder"] = Field(
        "auto", description="of `path`; auto: by its files' names"
    )
    cache: Path | None = Field(None, description="directory that `python -m ddil_dist.cache` made of this data")
    split: str = Field("train", description="of a data set on the hub, or of several saved together")
    image_column: str = Field("image", description="holds the images")
    text_column: str = Field("text", description="holds the captions")
    window: Positive | None = Field(
        None,
        description="shards or Parquet files that are held at a time: the data is read in sequence, its files in a "
        "seeded order and rows shuffled among so many, and what lies elsewhere is fetched when it is needed; None: all "
        "is fetched first, and read at random",
    )
    download: Path | None = Field(
        None, description="directory that data at an address is fetched into: once, or a window at a time"
    )
    fetch_timeout_s: PositiveSeconds = Field(3600.0, description="for one file that is fetched")
    pipe: bool = Field(False, description="run the commands of a path pipe:COMMAND, which print a shard each")
    background: str = Field("white", description="colour under what is transparent: a name that CSS has, or #rrggbb")
    prompts: Path | None = Field(None, description="a text file, one rollout prompt a line; None: the data's texts")

    @model_validator(mode="after")
    def _a_cache_is_read_at_random(self) -> DataConfig:
        if self.window is not None and self.cache is not None:
            raise ValueError("window: data.cache holds all of the data, and is read at random; set one of them to null")
        return self

    @field_validator("background")
    @classmethod
    def _a_colour(cls, value: str) -> str:
        ImageColor.getrgb(value)  # raises ValueError
        return value
