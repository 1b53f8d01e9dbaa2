"""What the weight board knows and owns: the newest versions' identities and their objects. `ray_store` runs it.

The publisher's own object is announced first, so that readers fetch it at once; then the board copies it into an
object that it owns itself, which outlives the publisher. Only then does `publish` return, so a version whose
publishing was acknowledged is never lost with its learner, unless the board said that it has no room for a copy. All
state dies with the board; the learner publishes again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from ddil_dist.errors import WeightsError
from ddil_dist.types import WeightsVersion
from ddil_dist.weights.store import InMemoryWeightStore


class NoRoomError(WeightsError):
    """There is no room for another copy of a version."""


@dataclass(frozen=True)
class _Entry:
    identity: WeightsVersion
    held: Any
    owned: bool


class WeightBoard:
    """Thread-safe: versions are found while another is being adopted.

    adopt: makes an object that the calling process owns of a publisher's; raises NoRoomError where there is none for
    it, and anything else if the publisher is gone.
    """

    def __init__(self, adopt: Callable[[Any], Any]) -> None:
        self._adopt = adopt
        self._lock = Lock()
        self._entries: dict[int, _Entry] = {}

    def publish(self, identity: WeightsVersion, held: list[Any]) -> bool:
        """Announce, adopt, return. Repeating it is harmless; held is the object's reference in a list.

        False where there is no room for a copy, even without the versions before: readers then find the publisher's
        own object, which must be kept until the next version.
        """
        version = identity.version
        with self._lock:
            newest = self._newest()
            known = self._entries.get(version)
            if known is not None and known.identity == identity:
                if known.owned:
                    return True
            elif newest is not None and version <= newest.version:
                raise WeightsError(f"weights version {version} is not newer than {newest.version}")
            self._entries[version] = _Entry(identity, held[0], owned=False)
            for old in sorted(self._entries)[: -InMemoryWeightStore.KEPT]:
                del self._entries[old]  # before the copy below, which can then have its memory
        try:
            own = self._adopt_in_what_room_there_is(version, held[0])
        except NoRoomError:
            return False
        except Exception:
            with self._lock:
                self._entries.pop(version, None)
            raise
        with self._lock:
            if version in self._entries:
                self._entries[version] = _Entry(identity, own, owned=True)
        return True

    def make_room(self, newest: int | None = None) -> None:
        """Forget every version, or all but this one: readers keep what they have applied."""
        with self._lock:
            for version in [version for version in self._entries if version != newest]:
                del self._entries[version]

    def _adopt_in_what_room_there_is(self, version: int, held: Any) -> Any:
        try:
            return self._adopt(held)
        except NoRoomError:
            self.make_room(version)
            return self._adopt(held)

    def newest(self) -> WeightsVersion | None:
        """Identity of the newest version; None before the first."""
        with self._lock:
            return self._newest()

    def find(self, version: int) -> list[Any]:
        """The version's identity and object reference, in a list so that Ray does not fetch it here; [] if unknown."""
        with self._lock:
            entry = self._entries.get(version)
        return [] if entry is None else [entry.identity, entry.held]

    def _newest(self) -> WeightsVersion | None:
        return self._entries[max(self._entries)].identity if self._entries else None
