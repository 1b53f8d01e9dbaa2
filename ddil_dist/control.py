"""A run's control keys in Redis: what every shell of the run may read, and who may write it.

All keys begin with `ddil:{run}:control:`. Written by: scale (wanted actors), stop (stop request), each rollout actor
(its heartbeat), the learner's rank 0 (its status, the newest weights version). Values are small and bounded: a
heartbeat that is `FORGET_AFTER_S` old is forgotten. Imports neither torch nor Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Final

import redis

from ddil_dist.errors import EnvironmentFailure

FORGET_AFTER_S: Final = 600.0
"""A heartbeat this old belongs to an actor that is gone."""

MAX_HEARTBEATS: Final = 4096
MAX_TEXT_BYTES: Final = 16_384


class RunControl:
    """Reads and writes a run's control keys. `client` comes from `replay.server.connect`.

    Every method raises EnvironmentFailure where the server cannot be reached.
    """

    def __init__(self, client: Any, run: str) -> None:
        self._redis = client
        self._prefix = f"ddil:{{{run}}}:control:"
        self.run = run

    # -- the wanted number of rollout actors, and the stop request ----------------------------------------------------

    def set_wanted_actors(self, num: int) -> None:
        """Ask for `num` rollout actors, 0 or more; the fleet's manager reconciles to it."""
        assert num >= 0, num
        self._call("SET", "wanted-actors", num)

    def wanted_actors(self) -> int | None:
        """The wanted number; None where nobody has asked yet."""
        found = self._call("GET", "wanted-actors")
        return None if found is None else int(found)

    def request_stop(self, reason: str = "asked to stop") -> None:
        """Ask the run to drain and end."""
        self._call("SET", "stop", reason[:MAX_TEXT_BYTES])

    def stop_request(self) -> str | None:
        """Why the run was asked to stop; None where it was not."""
        found = self._call("GET", "stop")
        return None if found is None else found.decode()

    def clear_stop(self) -> None:
        """Forget the stop request: the run begins anew."""
        self._call("DEL", "stop")

    # -- heartbeats of the rollout actors -----------------------------------------------------------------------------

    def beat(self, actor: str, heartbeat: Mapping[str, Any]) -> None:
        """Leave an actor's heartbeat: plain JSON values; its time (`time_s`, seconds since 1970) is added.

        Usual fields: incarnation, version (of the weights applied), states_per_s, trajectories_per_s, waiting_share,
        host, phase. Other fields pass through.
        """
        self._call("HSET", "heartbeats", actor, _dump({**heartbeat, "time_s": time.time()}))

    def heartbeats(self) -> dict[str, dict[str, Any]]:
        """The newest heartbeat of every actor that beat within `FORGET_AFTER_S`, by actor; older ones are removed."""
        found = self._load_all("heartbeats")
        oldest_s = time.time() - FORGET_AFTER_S
        fresh = {actor: beat for actor, beat in found.items() if beat.get("time_s", 0.0) >= oldest_s}
        fresh = dict(sorted(fresh.items(), key=lambda item: -item[1]["time_s"])[:MAX_HEARTBEATS])
        gone = [actor for actor in found if actor not in fresh]
        if gone:
            self._call("HDEL", "heartbeats", *gone)
        return dict(sorted(fresh.items()))

    def forget(self, actor: str) -> None:
        """Remove the heartbeat of an actor that was ended on purpose."""
        self._call("HDEL", "heartbeats", actor)

    # -- the learner --------------------------------------------------------------------------------------------------

    def set_learner(self, status: Mapping[str, Any]) -> None:
        """Leave the learner's status: plain JSON values; its time (`time_s`, seconds since 1970) is added.

        Usual fields: update, total_updates, losses (by role), updates_per_s, waiting_share, phase, prior (the wanted
        shares by source: forward, student, teacher). Other fields pass through.
        """
        self._call("SET", "learner", _dump({**status, "time_s": time.time()}))

    def learner(self) -> dict[str, Any] | None:
        """The learner's newest status; None before the first."""
        found = self._call("GET", "learner")
        return None if found is None else _load(found)

    def set_newest_weights(self, version: Mapping[str, Any]) -> None:
        """Note the newest published weights: the fields of a `WeightsVersion` (dataclasses.asdict)."""
        self._call("SET", "weights", _dump({**version, "time_s": time.time()}))

    def newest_weights(self) -> dict[str, Any] | None:
        """Fields of the newest published `WeightsVersion` and its `time_s`; None before the first."""
        found = self._call("GET", "weights")
        return None if found is None else _load(found)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the client."""
        self._redis.close()

    def _call(self, command: str, key: str, *args: Any) -> Any:
        try:
            return self._redis.execute_command(command, self._prefix + key, *args)
        except redis.exceptions.OutOfMemoryError:
            raise EnvironmentFailure(
                f"the Redis server is full: {key} of run {self.run} was not written; raise its maxmemory"
            ) from None
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
            raise EnvironmentFailure(
                f"the Redis server of run {self.run} cannot be reached: {type(error).__name__}; is it running?"
            ) from None

    def _load_all(self, key: str) -> dict[str, dict[str, Any]]:
        found = self._call("HGETALL", key)
        return {_as_text(name): _load(value) for name, value in found.items()}


def _as_text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def _dump(value: Mapping[str, Any]) -> str:
    """JSON of a status; one that is absurdly long is a bug of its writer."""
    text = json.dumps(value, allow_nan=True, separators=(",", ":"))
    assert len(text) <= MAX_TEXT_BYTES, f"a status of {len(text)} characters"
    return text


def _load(data: bytes | str) -> dict[str, Any]:
    value = json.loads(data)
    assert isinstance(value, dict), value
    return value
