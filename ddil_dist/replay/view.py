"""What one client knows of a run's shards: a mirror of what lies where, the settings, the rate limiter's counters.

A mirror follows its shard's log. It starts anew when the log has gone on too far, when a connection broke (the server
may have restarted and lost its last second), or when the server answers as another incarnation (it lost everything:
the shard is then made again, with the settings and the note of the newest weights that this client wrote).
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from ddil_dist.config import ReplayConfig
from ddil_dist.errors import ConfigError
from ddil_dist.replay.buffer import describe_draw
from ddil_dist.replay.codec import Codec
from ddil_dist.replay.index import SlotIndex
from ddil_dist.replay.limiter import LimiterSettings, RateLimiter
from ddil_dist.replay.reader import as_text, settings_of, weights_of
from ddil_dist.replay.shard import Account, Shard, exchange, pack, pairs
from ddil_dist.replay.waits import Deadline
from ddil_dist.types import Draw, WeightsVersion

logger = logging.getLogger(__name__)

STATE_ONLY = -2
"""Instead of a log position: the state is wanted, not the changes."""


class Mirror:
    """One shard as this client knows it: `state` as the server gave it, and the index of what lies where."""

    def __init__(self, shard: Shard, codec: Codec) -> None:
        self.shard = shard
        self.index = SlotIndex(len(codec.meta))
        self._codec = codec
        self.incarnation = ""
        self.state: dict[str, str] = {}
        self.ops = -1
        """Log entries that `index` has applied; -1: it must start anew."""
        self._epoch = -1
        self._used = np.zeros(0, np.bool_)
        """By slot: this client has told that a sample has had its record. True only of what lies there by `index`."""

    def number(self, name: str) -> int:
        """An integer of the shard's state, 0 if absent."""
        return int(float(self.state.get(name, "0")))

    def request(self, *, contents: bool) -> bytes:
        """A packed question for what changed; without `contents`, for the state only."""
        if self._epoch != self.shard.epoch:
            self.ops = -1
        self._epoch = self.shard.epoch
        return self.shard.call("sync", self.incarnation, self.ops if contents else STATE_ONLY)

    def take(self, answer: Sequence[Any], *, contents: bool) -> None:
        """Follow the answer to `request`."""
        kind, changes, state = answer
        self.state = pairs(state)
        if not contents:
            return
        if kind == b"all":
            self.index.load(np.frombuffer(changes, self._codec.meta_dtype))
            self._used = np.zeros(len(changes) // self._codec.meta_dtype.itemsize, np.bool_)
        elif changes:
            entries = np.frombuffer(changes, self._codec.log_dtype)
            self.index.apply(entries)
            more = int(entries["slot"].max()) + 1 - len(self._used)
            if more > 0:
                self._used = np.concatenate([self._used, np.zeros(max(1024, len(self._used), more), np.bool_)])
            self._used[entries["slot"]] = False
        self.ops = self.number("ops")

    def note_used(self, slots: Sequence[int]) -> bytes:
        """Those of the slots that the server is to be told of now, packed u32s; from now on they are told of."""
        found = np.array(slots, np.uint32)
        fresh = found[~self._used[found]]
        if not len(fresh):
            return b""
        self._used[fresh] = True
        return np.unique(fresh).tobytes()

    def forget_used(self, fresh: bytes) -> None:
        """The server has perhaps not been told."""
        slots = np.frombuffer(fresh, np.uint32)
        self._used[slots[slots < len(self._used)]] = False


class View:
    """Every shard's mirror, under one lock that callers hold around `sync` and what they read after it."""

    def __init__(self, shards: Sequence[Shard], config: ReplayConfig, codec: Codec, *, account: Account) -> None:
        self.mirrors = [Mirror(shard, codec) for shard in shards]
        self.lock = threading.RLock()
        self._config = config
        self._account = account
        self._changed: dict[str, str] = {}
        """What this client wrote into the first shard's state, for a shard that is made again."""

    @property
    def first(self) -> Mirror:
        """The shard that keeps the limiter, the settings and the note of the newest weights for all."""
        return self.mirrors[0]

    # -- opening and following ----------------------------------------------------------------------------------------

    def open(self, mirror: Mirror, deadline: Deadline) -> None:
        """Open a shard, or make it where the server has none: at first, or after it lost its data."""
        config, number = self._config, len(self.mirrors)
        fields = {
            "capacity": str(max(1, config.capacity // number)),
            "capacity_bytes": str(max(1, config.capacity_bytes // number)),
            "removal": config.removal,
            "shards": str(number),
            "samples_per_insert": as_text(config.samples_per_insert),
            "min_size": as_text(config.min_size),
            "error_buffer": as_text(config.error_buffer),
            "max_staleness": as_text(config.max_staleness),
            **self._changed,
        }
        args = [text for pair in fields.items() for text in pair]
        with self.lock:
            packed = mirror.shard.call("init", "i-" + secrets.token_hex(8), *args)
            mirror.state = pairs(self.exchange(mirror, packed, deadline, "opening the buffer"))
            before, mirror.incarnation, mirror.ops = mirror.incarnation, mirror.state["incarnation"], -1
            if before not in ("", mirror.incarnation):
                logger.warning(
                    "replay server %s lost its data (incarnation %s follows %s); the run fills it again",
                    mirror.shard.where,
                    mirror.incarnation,
                    before,
                )
            noted = self._changed.get("weights")
            if mirror is self.first and noted is not None and "weights" not in mirror.state:
                self.write({"weights": noted}, deadline)

    def check_bounds(self) -> None:
        """Raise ConfigError where the buffer of this run exists with other bounds, or with other latents."""
        number = len(self.mirrors)
        held, wanted_dtype = self.layout.split(":")[0], self._config.latent_dtype
        if held not in ("", wanted_dtype):
            raise ConfigError(
                f"replay.latent_dtype: {wanted_dtype}, but this run's buffer holds {held}; keep that, or choose "
                "another run.name"
            )
        for name in ("capacity", "capacity_bytes", "removal"):
            wanted = getattr(self._config, name)
            for mirror in self.mirrors:
                found = mirror.state[name]
                if found != (wanted if name == "removal" else str(max(1, wanted // number))):
                    raise ConfigError(
                        f"replay.{name}: {wanted}, but this run's buffer exists with "
                        f"{found if name == 'removal' else int(found) * number}; keep that, or choose another run.name"
                    )

    def sync(self, deadline: Deadline, *, contents: bool) -> None:
        """Bring every mirror up to date; without `contents`, its state only, which costs actors nothing."""
        with self.lock:
            todo = list(self.mirrors)
            while todo:
                requests = [(mirror.shard, mirror.request(contents=contents), 1) for mirror in todo]
                answers = exchange(requests, deadline, who="reading the buffer", account=self._account)
                lost = []
                for mirror, (answer,) in zip(todo, answers, strict=True):
                    if answer[0] == b"reset":
                        self.open(mirror, deadline)
                        lost.append(mirror)
                    else:
                        mirror.take(answer, contents=contents)
                todo = lost

    def exchange(self, mirror: Mirror, packed: bytes, deadline: Deadline, who: str) -> Any:
        """The one answer of a shard to one packed command."""
        return exchange([(mirror.shard, packed, 1)], deadline, who=who, account=self._account)[0][0]

    def write(self, fields: dict[str, str], deadline: Deadline) -> None:
        """Change the first shard's settings, or its note of the newest weights."""
        args = [text for pair in fields.items() for text in pair]
        while True:
            packed = self.first.shard.call("configure", self.first.incarnation, *args)
            if self.exchange(self.first, packed, deadline, "changing settings")[0] == b"ok":
                return
            self.open(self.first, deadline)

    def note_weights(self, newest: WeightsVersion, deadline: Deadline) -> None:
        """See `ReplayBuffer.note_weights`."""
        noted = {"weights": json.dumps(asdict(newest))}
        self._changed |= noted  # without the lock, which a sample holds while a server is away
        self.write(noted, deadline)

    def forget_weights(self, deadline: Deadline) -> None:
        """See `RedisReplay.forget_weights`."""
        self._changed.pop("weights", None)
        self.write({"weights": ""}, deadline)

    def configure(self, changes: dict[str, Any], deadline: Deadline) -> None:
        """See `ReplayBuffer.configure`."""
        with self.lock:
            self.sync(deadline, contents=False)
            settings = self.settings.changed(**changes)
            written = {name: as_text(getattr(settings, name)) for name in changes}
            self.write(written, deadline)
            self._changed.update(written)

    def count_refused(self, deadline: Deadline) -> None:
        """Count a state that was refused before it was sent."""
        packed = pack(b"HINCRBY", self.first.shard.keys[0], b"refused", 1)
        self.exchange(self.first, packed, deadline, "counting a refusal")

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> LimiterSettings:
        """The rate limiter's settings, as they were at the last sync."""
        return settings_of(self.first.state)

    @property
    def newest(self) -> int:
        """The version of the newest weights; 0 before the first."""
        weights = weights_of(self.first.state)
        return 0 if weights is None else weights.version

    @property
    def layout(self) -> str:
        """Dtype and shape of the run's latents, as the first shard that holds any has it; "" where none does."""
        return next((mirror.state["layout"] for mirror in self.mirrors if "layout" in mirror.state), "")

    @property
    def limiter(self) -> RateLimiter:
        """The rate limiter, as it was at the last sync."""
        return RateLimiter(
            self.settings,
            num_inserted=self.first.number("offered"),
            num_sampled=self.first.number("charged"),
            size=self.total("size"),
        )

    def total(self, name: str) -> int:
        """Sum over the shards of a number of their state."""
        return sum(mirror.number(name) for mirror in self.mirrors)

    def missing(self, draws: Sequence[Draw]) -> str:
        """Why some draw has nothing to choose from, in words; "" where each has."""
        newest, staleness = self.newest, self.settings.max_staleness
        for draw in draws:
            if draw.num and not any(m.index.count(draw, newest=newest, staleness=staleness) for m in self.mirrors):
                bound = "" if staleness is None else f" within replay.max_staleness = {staleness} of version {newest}"
                return (
                    f"for inserts: none of the {self.total('size')} live states is of {describe_draw(draw)}{bound}; "
                    "do rollout actors make such states?"
                )
        return ""

    def forget_used(self, fresh: dict[int, bytes]) -> None:
        """The servers have perhaps not been told."""
        with self.lock:
            for number, slots in fresh.items():
                self.mirrors[number].forget_used(slots)

    def choose(
        self, draws: Sequence[Draw], rng: np.random.Generator
    ) -> tuple[list[tuple[int, int]], npt.NDArray[np.int64], dict[int, bytes]]:
        """(shard, slot) for every state that the draws ask for; how many are of each source, [4]; what is fresh.

        Fresh, by shard, are the slots that the servers are to be told of (`Mirror.note_used`); if they are not after
        all, `forget_used` is to hear it.
        """
        newest, staleness = self.newest, self.settings.max_staleness
        picks: list[tuple[int, int]] = []
        by_source = np.zeros(4, np.int64)
        chosen: dict[int, list[int]] = {}
        for draw in draws:
            counts = np.array([m.index.count(draw, newest=newest, staleness=staleness) for m in self.mirrors])
            shares = rng.multinomial(draw.num, counts / counts.sum()) if len(counts) > 1 else [draw.num]
            for number, share in enumerate(shares):
                slots, found = self.mirrors[number].index.choose(
                    draw, int(share), newest=newest, staleness=staleness, rng=rng
                )
                picks += [(number, slot) for slot in slots]
                chosen.setdefault(number, []).extend(slots)
                by_source[: len(found)] += found
        return picks, by_source, {number: self.mirrors[number].note_used(slots) for number, slots in chosen.items()}
