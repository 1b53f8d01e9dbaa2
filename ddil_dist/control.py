"""A run's control keys in Redis: what every shell of the run may read, and who writes it.

All keys begin with `ddil:{run}:control:`. Written by: the supervisor and scale (wanted actors, bounds of autoscaling),
the launcher and stop (stop request), the supervisor (its sign of life), the fleet (its status, incarnations), each
rollout actor (its heartbeat), the learner's rank 0 (its status, place and news). Values are small and bounded: a
heartbeat that is `FORGET_AFTER_S` old is forgotten. The newest weights are noted with the replay buffer, whose ages
count from them.

    control = RunControl.from_url(url, run="demo")
    control.set_wanted_actors(3)

Imports neither torch nor Ray.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import redis

from ddil_dist.config import RedisConfig
from ddil_dist.errors import EnvironmentFailure
from ddil_dist.replay.server import connect

FORGET_AFTER_S: Final = 600.0
"""A heartbeat this old belongs to an actor that is gone."""

HEARTBEAT_S: Final = 2.0
"""An actor that rolls out beats this often."""

MAX_HEARTBEATS: Final = 4096
MAX_NEWS: Final = 100
MAX_TEXT_CHARS: Final = 16_384
MAX_REASON_CHARS: Final = 2_000


class RunControl:
    """Reads and writes a run's control keys. `client` comes from `replay.server.connect`.

    Every method raises EnvironmentFailure where the server cannot be reached or is full.
    """

    def __init__(self, client: Any, run: str) -> None:
        self._redis = client
        self._prefix = f"ddil:{{{run}}}:control:"
        self.run = run

    @classmethod
    def from_url(cls, url: str, run: str) -> RunControl:
        """The control keys of `run` on the server at `url`. Raises EnvironmentFailure as `connect` does."""
        return cls(connect(RedisConfig(url=url)), run)

    # -- the wanted number of rollout actors, and the stop request ----------------------------------------------------

    def set_wanted_actors(self, num: int) -> None:
        """Ask for `num` rollout actors, 0 or more; the fleet's manager reconciles to it."""
        assert num >= 0, num
        self._call("SET", "wanted-actors", num)

    def wanted_actors(self) -> int | None:
        """The wanted number; None where nobody has asked yet, or the server has lost its data."""
        found = self._call("GET", "wanted-actors")
        return None if found is None else int(found)

    def set_autoscale(self, bounds: tuple[int, int] | None) -> None:
        """Let the fleet choose the wanted number within (least, most) by itself; None: as many as asked for."""
        if bounds is None:
            self._call("DEL", "autoscale")
        else:
            assert 1 <= bounds[0] <= bounds[1], bounds
            self._call("SET", "autoscale", _dump({"min": bounds[0], "max": bounds[1]}))

    def autoscale(self) -> tuple[int, int] | None:
        """The bounds of autoscaling, (least, most); None while it is off."""
        found = self._call("GET", "autoscale")
        return None if found is None else (_load(found)["min"], _load(found)["max"])

    def request_stop(self, reason: str = "asked to stop") -> None:
        """Ask the run to drain and end."""
        self._call("SET", "stop", reason[:MAX_TEXT_CHARS])

    def stop_requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self.stop_reason() is not None

    def stop_reason(self) -> str | None:
        """Why the run was asked to stop; None where it was not."""
        found = self._call("GET", "stop")
        return None if found is None else _as_text(found)

    def clear_stop(self) -> None:
        """Forget the stop request: the run begins anew."""
        self._call("DEL", "stop")

    # -- the supervisor and the fleet ---------------------------------------------------------------------------------

    def set_supervisor(self, status: Mapping[str, Any], *, alive_s: float) -> None:
        """The run goes on: plain JSON values with `state` ("starting", "running", "stopping" or "ended"); `time` is
        added. alive_s: after as long a silence it is taken for dead."""
        self._call("SET", "supervisor", _dump({**status, "time": time.time()}))
        self._call("SET", "alive", 1, "EX", math.ceil(alive_s))  # by the server's clock alone

    def supervisor(self) -> dict[str, Any]:
        """The supervisor's newest sign of life; empty before the first."""
        found = self._call("GET", "supervisor")
        return {} if found is None else _load(found)

    def is_alive(self) -> bool:
        """Whether the run is going on: its supervisor has given a sign of life of late and has not ended."""
        return self._call("GET", "alive") is not None and self.supervisor().get("state") != "ended"

    def set_fleet(self, status: Mapping[str, Any]) -> None:
        """Leave the fleet's status: wanted, running, waiting (for resources), backing_off; plain JSON values."""
        self._call("SET", "fleet", _dump({**status, "time": time.time()}))

    def fleet(self) -> dict[str, Any]:
        """The fleet's newest status; empty before the first."""
        found = self._call("GET", "fleet")
        return {} if found is None else _load(found)

    # -- rollout actors -----------------------------------------------------------------------------------------------

    def next_incarnation(self, actor: str, *, above: int = 0) -> int:
        """A number that no earlier life of `actor` had, from 1: part of its writer id, so that batches never mix.

        above: the newest that the caller knows of; this server may have lost its data, and others not.
        """
        found = int(self._call("HINCRBY", "incarnations", actor, 1))
        return found if found > above else int(self._call("HINCRBY", "incarnations", actor, above + 1 - found))

    def heartbeat(self, actor: str, beat: Mapping[str, Any]) -> None:
        """Leave an actor's heartbeat: plain JSON values, to which `time` (seconds since 1970) is added.

        The monitor understands: writer, version (of the weights applied), states, alive_s, insert_wait_s, failed,
        data (`ddil_dist.data.skipped`).
        """
        self._call("HSET", "heartbeats", actor, _dump({**beat, "time": time.time()}))

    def heartbeats(self) -> dict[str, dict[str, Any]]:
        """The newest heartbeat of every actor that beat within `FORGET_AFTER_S`, by actor. Older ones are removed."""
        found = {_as_text(name): _load(value) for name, value in self._call("HGETALL", "heartbeats").items()}
        oldest = time.time() - FORGET_AFTER_S
        newest_first = sorted(found, key=lambda actor: -float(found[actor]["time"]))
        kept = [actor for actor in newest_first[:MAX_HEARTBEATS] if found[actor]["time"] >= oldest]
        gone = found.keys() - set(kept)
        if gone:
            with suppress(EnvironmentFailure):  # who may only read leaves them to the others
                self._call("HDEL", "heartbeats", *gone)
        return {actor: found[actor] for actor in sorted(kept)}

    def forget(self, actor: str) -> None:
        """Remove the heartbeat of an actor that was ended on purpose."""
        self._call("HDEL", "heartbeats", actor)

    # -- the learner --------------------------------------------------------------------------------------------------

    def set_learner_status(self, status: Mapping[str, Any]) -> None:
        """Leave the learner's status: plain JSON values; `time` (seconds since 1970) is added if it is not there.

        The monitor understands: phase, update, total_updates, loss, updates_per_s, wait_share, prior (the wanted
        shares of replayed states by source name), workers, data (`ddil_dist.data.skipped`).
        """
        self._call("SET", "learner", _dump({"time": time.time(), **status}))

    def learner_status(self) -> dict[str, Any]:
        """The learner's newest status; empty before the first."""
        found = self._call("GET", "learner")
        return {} if found is None else _load(found)

    def set_learner_place(self, placement_group: str) -> None:
        """Leave the hexadecimal id of the placement group that the learner's workers are in."""
        self._call("SET", "learner-place", placement_group)

    def learner_place(self) -> str | None:
        """The placement group of the learner's newest workers; None before the first."""
        found = self._call("GET", "learner-place")
        return None if found is None else _as_text(found)

    def count_start(self, update: int) -> int:
        """The learner's workers start at this update; how often they have in a row. A new checkpoint begins anew."""
        found = self._call("GET", "starts")
        last = {} if found is None else _load(found)
        starts = last["starts"] + 1 if last.get("update") == update else 1
        self._call("SET", "starts", _dump({"update": update, "starts": starts}))
        return int(starts)

    def ask_for_checkpoint(self, *, within_s: float) -> None:
        """The learner's workers are about to be restarted on purpose: let them write a checkpoint before."""
        self._call("SET", "checkpoint-wanted", 1, "EX", math.ceil(within_s))

    def checkpoint_wanted(self) -> bool:
        """Whether a checkpoint was asked for that is not there yet, and its time is not over."""
        return self._call("GET", "checkpoint-wanted") is not None

    def checkpoint_taken(self) -> None:
        """The checkpoint that was asked for is there: the start that follows is nobody's death."""
        for key in ("starts", "checkpoint-wanted"):
            self._call("DEL", key)

    def note_death(self, reason: str) -> None:
        """A worker has died; all are started again."""
        self._call("SET", "death", reason[:MAX_TEXT_CHARS])

    def last_death(self) -> str | None:
        """Why a worker died last."""
        found = self._call("GET", "death")
        return None if found is None else _as_text(found)

    def tell(self, sentence: str) -> None:
        """Leave a sentence for whoever watches the run; of those that nobody takes the last `MAX_NEWS` are kept."""
        self._call("RPUSH", "news", sentence[:MAX_TEXT_CHARS])
        self._call("LTRIM", "news", -MAX_NEWS, -1)

    def take_news(self) -> list[str]:
        """The sentences that were left, in their order; each is taken once."""
        return [_as_text(sentence) for sentence in self._call("LPOP", "news", MAX_NEWS) or ()]

    def set_failure(self, reason: str) -> None:
        """The learner has failed for good: a key of its own, which no later status of another worker touches."""
        self._call("SET", "failure", reason[:MAX_TEXT_CHARS])

    def failure(self) -> str | None:
        """Why the learner has failed; None where it has not."""
        found = self._call("GET", "failure")
        return None if found is None else _as_text(found)

    def forget_failures(self) -> None:
        """The run is launched anew: what failed before does not count."""
        for key in ("starts", "death", "failure", "checkpoint-wanted"):
            self._call("DEL", key)

    def close(self) -> None:
        """Close the client."""
        self._redis.close()

    def _call(self, command: str, key: str, *args: Any) -> Any:
        try:
            return self._redis.execute_command(command, self._prefix + key, *args)
        except redis.exceptions.OutOfMemoryError:
            raise EnvironmentFailure(
                f"the Redis server of run {self.run} is full: '{key}' was not written; raise its maxmemory"
            ) from None
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
            raise EnvironmentFailure(
                f"the Redis server of run {self.run} cannot be reached: {type(error).__name__}; is it running?"
            ) from None
        except redis.exceptions.RedisError as error:  # it fails over, cannot write its file, refuses the user
            raise EnvironmentFailure(f"the Redis server of run {self.run} cannot answer now: {error}") from None


def reason_of(error: object) -> str:
    """An error in few enough characters for a status."""
    text = str(error).strip() or repr(error)
    half = MAX_REASON_CHARS // 2
    return text if len(text) <= MAX_REASON_CHARS else f"{text[:half]} ... {text[-half:]}"


def _as_text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def _dump(value: Mapping[str, Any]) -> str:
    """JSON of a status; one that is absurdly long is a bug of its writer."""
    text = json.dumps(value, separators=(",", ":"))
    assert len(text) <= MAX_TEXT_CHARS, f"a status of {len(text)} characters"
    return text


def _load(data: bytes | str) -> dict[str, Any]:
    value = json.loads(data)
    assert isinstance(value, dict), value
    return value
