"""The replay buffer, and the Redis that it is kept in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlparse

from pydantic import Field, field_validator, model_validator

from ddil_dist.section import Positive, PositiveFloat, PositiveSeconds, Precision, Section


class ReplayConfig(Section):
    """The aggregated replay buffer: its bounds, and the balance of inserts and samples."""

    capacity: Annotated[int, Field(gt=0, lt=2**32)] = Field(100_000, description="states kept")
    capacity_bytes: Positive = Field(2 * 2**30, description="bytes of records kept")
    removal: Literal["oldest", "reservoir"] = Field(
        "oldest", description="oldest: they go first; reservoir: every state ever inserted is kept with equal chance"
    )
    min_size: Positive = Field(256, description="states that must be live before the first sample")
    samples_per_insert: PositiveFloat = Field(8.0, description="how often a state is sampled on average")
    error_buffer: PositiveFloat = Field(
        2048.0, description="how far samples and inserts may run from that ratio before one waits"
    )
    max_staleness: Positive | None = Field(None, description="student updates after which a state is not sampled")
    latent_dtype: Precision = Field(
        "float32", description="of the latents kept; float16 halves the buffer and its traffic at no error that shows"
    )

    @model_validator(mode="after")
    def _can_be_sampled(self) -> ReplayConfig:
        if self.min_size > self.capacity:
            raise ValueError(
                f"min_size: {self.min_size} exceeds replay.capacity ({self.capacity}): no sample could ever be taken; "
                "lower min_size"
            )
        return self


class RedisConfig(Section):
    """The replay server. Without a URL the run starts a server of its own on the loopback."""

    url: str | None = Field(None, repr=False, description="redis:// or rediss://; None: embedded")
    more_urls: tuple[str, ...] = Field((), repr=False, description="further servers; states are spread over all")
    shards: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="hash tags at each URL; more than one spreads the states over the nodes of a Redis Cluster"
    )
    username: str | None = Field(None, description="ACL user; the URL's own wins")
    password_file: Path | None = Field(None, description="holds the password; or set DDIL_REDIS_PASSWORD")
    connect_timeout_s: PositiveSeconds = Field(5.0, description="for the server to take a connection")
    answer_timeout_s: PositiveSeconds = Field(
        10.0, description="for the server to answer one command; raise it for one that is far or slow"
    )
    load_timeout_s: PositiveSeconds = Field(
        60.0, description="for a server that starts to load its data; raise it for a slow disk"
    )
    stop_timeout_s: PositiveSeconds = Field(20.0, description="for the run's own server to write its file and end")

    @field_validator("url", "more_urls")
    @classmethod
    def _url_has_a_scheme(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for url in (value,) if isinstance(value, str) else value or ():
            if not re.match(r"rediss?://", url):
                raise ValueError("must begin with redis:// or rediss://, as in redis://host:6379/0")
            try:
                _ = urlparse(url).port
            except ValueError:
                raise ValueError(
                    "its port is no number up to 65535; percent-encode a password with '/', '#' or '?' in it"
                ) from None
        return value

    @model_validator(mode="after")
    def _more_urls_follow_one(self) -> RedisConfig:
        if self.more_urls and self.url is None:
            raise ValueError("more_urls: set without url; put the first server into redis.url")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """Every server, the first one first; empty: embedded."""
        return () if self.url is None else (self.url, *self.more_urls)
