"""The rate limiter: holds samples and inserts to a ratio, as Reverb's `SampleToInsertRatio` does.

Let inserts be the states ever inserted, samples those ever sampled, and

    cursor = inserts * samples_per_insert - samples
    centre = min_size * samples_per_insert

A sample of n waits while fewer than `min_size` states are live, or while it would leave

    cursor - n < centre - error_buffer          ("samples run ahead of inserts")

An insert of n waits once `min_size` states have been inserted and while it would make

    cursor + n * samples_per_insert > centre + error_buffer     ("inserts run ahead of samples")

So on average every state is sampled `samples_per_insert` times, and either side may run ahead of the ratio by
`error_buffer` samples. The buffer must exceed what one sample and one insert move together, else both can wait for
each other: 2 error_buffer >= batch_size + insert_batch * samples_per_insert.
The Lua scripts of the Redis backend repeat this arithmetic; the contract suite holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ddil_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LimiterSettings:
    """What may be changed on a running run.

    samples_per_insert   wanted samples of one inserted state, > 0.
    min_size             live states needed before the first sample, >= 1.
    error_buffer         samples that either side may run ahead, > 0.
    max_staleness        student updates after which a state is not sampled; None: no bound.
    """

    samples_per_insert: float
    min_size: int
    error_buffer: float
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("samples_per_insert", 0 < self.samples_per_insert < float("inf"), "a positive number"),
            ("min_size", self.min_size >= 1, "at least 1"),
            ("error_buffer", 0 < self.error_buffer < float("inf"), "a positive number"),
            ("max_staleness", self.max_staleness is None or self.max_staleness >= 1, "None or at least 1"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ConfigError(f"replay.{name}: {getattr(self, name)}; it must be {rule}")

    def changed(self, **changes: Any) -> LimiterSettings:
        """These settings with some changed; raises ConfigError for an unknown name or a bad value."""
        unknown = set(changes) - {setting.name for setting in fields(self)}
        if unknown:
            raise ConfigError(
                f"{', '.join(sorted(unknown))}: cannot be changed on a running run; these can: "
                f"{', '.join(setting.name for setting in fields(self))}"
            )
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class RateLimiter:
    """Decides from the counters alone; holds no state of its own.

    num_inserted, num_sampled    states ever inserted and ever sampled.
    size                         live states.
    """

    settings: LimiterSettings
    num_inserted: int
    num_sampled: int
    size: int

    @property
    def cursor(self) -> float:
        """inserts * samples_per_insert - samples."""
        return self.num_inserted * self.settings.samples_per_insert - self.num_sampled

    @property
    def min_diff(self) -> float:
        """Least cursor that a sample may leave."""
        return self.settings.min_size * self.settings.samples_per_insert - self.settings.error_buffer

    @property
    def max_diff(self) -> float:
        """Greatest cursor that an insert may leave."""
        return self.settings.min_size * self.settings.samples_per_insert + self.settings.error_buffer

    def can_sample(self, num: int) -> bool:
        """Whether a sample of `num` states may be taken now."""
        return self.size >= self.settings.min_size and self.cursor - num >= self.min_diff

    def can_insert(self, num: int) -> bool:
        """Whether an insert of `num` states may be made now."""
        if self.num_inserted < self.settings.min_size:
            return True
        return self.cursor + num * self.settings.samples_per_insert <= self.max_diff

    def why_no_sample(self, num: int) -> str:
        """For whom a sample waits, with the numbers."""
        if self.size < self.settings.min_size:
            return (
                f"for inserts: {self.size} states are live, replay.min_size is {self.settings.min_size}; "
                "are rollout actors running?"
            )
        need = (num + self.min_diff - self.cursor) / self.settings.samples_per_insert
        return (
            f"for about {max(1, round(need))} more inserts: each state is sampled {self.settings.samples_per_insert:g} "
            "times on average; add rollout actors or raise replay.samples_per_insert"
        )

    def why_no_insert(self, num: int) -> str:
        """For whom an insert waits, with the numbers."""
        need = self.cursor + num * self.settings.samples_per_insert - self.max_diff
        return (
            f"for about {max(1, round(need))} more samples: inserts run ahead of "
            f"replay.samples_per_insert = {self.settings.samples_per_insert:g}; is the learner running?"
        )

    def check_insert(self, num: int) -> None:
        """Raise ConfigError where an insert of `num` could wait for ever."""
        step = num * self.settings.samples_per_insert
        if step > 2 * self.settings.error_buffer:
            raise ConfigError(
                f"replay.error_buffer: {self.settings.error_buffer:g} is less than half of what one insert of {num} "
                f"states moves the limiter ({step:g} samples): it could never be let in; raise error_buffer or "
                "insert fewer states at once"
            )

    def check_sample(self, num: int) -> None:
        """Raise ConfigError where a sample of `num` could wait for ever."""
        if num > 2 * self.settings.error_buffer:
            raise ConfigError(
                f"replay.error_buffer: {self.settings.error_buffer:g} is less than half of a sample of {num} states: "
                "samples and inserts would wait for each other; raise it"
            )
