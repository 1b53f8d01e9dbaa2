"""The cluster's weight store: versions as objects in Ray's object store, found through a small actor, the board.

The publisher's own object is announced first, so that readers fetch it at once; then the board copies it into an object
that it owns itself, which outlives the publisher. Only then does `publish` return, so a version whose publishing was
acknowledged is never lost with its learner, unless the board said that it has no room for a copy.

No collective joins learner and actors: each pulls when it likes, so a dead or slow one stalls nobody. A board that dies
is started again, empty: readers see nothing new and keep what they have applied, until the learner publishes again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayActorError, RayError

from ddil_dist.errors import WaitTimeoutError, WeightsError
from ddil_dist.on_ray import NAMESPACE, actor_name, on_this_node
from ddil_dist.types import WeightsVersion
from ddil_dist.weights.flat import PackedWeights
from ddil_dist.weights.store import InMemoryWeightStore

TIMEOUT_S = 60.0
RETRY_S = 0.2
ROOM_S = 5.0
BOARD_THREADS = 8
REMEDY = "give the object stores room for four versions (ray start --object-store-memory)"

logger = logging.getLogger(__name__)


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


class RayWeightBoard(WeightBoard):
    """Runs as a Ray actor without a CPU of its own, with a few threads: readers do not wait for a publisher."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(lambda reference: _put(ray.get(reference, timeout=timeout_s)))


def start_board(run: str, *, timeout_s: float = TIMEOUT_S) -> Any:
    """Start the run's board, here. Restarted, empty, whenever it dies; it ends with the process that started it."""
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=BOARD_THREADS)(RayWeightBoard)
    options = {"name": actor_name(run, "weights"), "namespace": NAMESPACE, "scheduling_strategy": on_this_node()}
    return remote.options(**options).remote(timeout_s)


class RayWeightStore:
    """A client of the board, with a deadline on every call.

    room_s: for the object store to give back what the board has let go of.
    """

    def __init__(self, board: Any, *, timeout_s: float = TIMEOUT_S, room_s: float = ROOM_S) -> None:
        self._room_s = room_s
        self._board = board
        self._timeout_s = timeout_s
        self._held: Any = None

    def publish(self, packed: PackedWeights) -> None:
        """Returns when the board owns a copy; readers see the version before. A board that is restarting is awaited.

        Where the object stores are full fewer versions are kept: none besides the new one, and of that no second copy.
        """
        doing = f"publishing version {packed.version.version}"
        deadline = time.monotonic() + self._timeout_s
        held = self._put_with_room_made(packed, doing, deadline)
        while True:
            try:
                owned = self._get(self._board.publish.remote(packed.version, [held]), doing, deadline)
                break
            except RayActorError as error:
                if time.monotonic() + RETRY_S > deadline:
                    raise WaitTimeoutError(
                        f"weights: {doing} waited {self._timeout_s:g} s for the run's weight board, which did not come "
                        f"back (see ray list actors): {_first_line(error)}"
                    ) from error
                time.sleep(RETRY_S)
        if not owned:
            logger.warning(
                "weights: %s left no room for a second copy of %d bytes, so that it would end with the learner; %s",
                *(doing, packed.version.size_bytes, REMEDY),
            )
        self._held = None if owned else held

    def _put_with_room_made(self, packed: PackedWeights, doing: str, deadline: float) -> Any:
        """The version in this node's object store, at the cost of those before where it is full."""
        last_try = min(deadline, time.monotonic() + self._room_s)
        try:
            return _put(packed)
        except NoRoomError:
            self._held = None
            with suppress(RayActorError):
                self._get(self._board.make_room.remote(), doing, deadline)
        while True:
            try:
                return _put(packed)
            except NoRoomError as error:
                if time.monotonic() > last_try:
                    raise WeightsError(
                        f"weights: {doing} found no room for {packed.version.size_bytes} bytes in this node's object "
                        f"store, though no other version is kept: {error}; {REMEDY}"
                    ) from error
                time.sleep(RETRY_S)

    def newest(self) -> WeightsVersion | None:
        """Identity of the newest version; None before the first, and while the board is restarting."""
        try:
            newest = self._get(self._board.newest.remote(), "asking for the newest version")
        except RayActorError:
            return None
        assert newest is None or isinstance(newest, WeightsVersion)
        return newest

    def load(self, version: int) -> PackedWeights:
        """A version's weights, in shared memory. WeightsError if they cannot be had: look again for the newest."""
        deadline = time.monotonic() + self._timeout_s
        try:
            found = self._get(self._board.find.remote(version), f"asking for version {version}", deadline)
        except RayActorError as error:
            raise WeightsError(
                f"weights version {version}: the run's weight board is restarting; ask for the newest again"
            ) from error
        if not found:
            raise WeightsError(f"weights version {version} is not kept any more; ask for the newest")
        identity, reference = found
        packed = self._get(reference, f"fetching version {version}", deadline)
        assert isinstance(packed, PackedWeights)
        if packed.version != identity:
            raise WeightsError(f"weights version {version}: the board announced {identity}, it holds {packed.version}")
        return packed

    def _get(self, reference: Any, doing: str, deadline: float | None = None) -> Any:
        """The answer of the board, or an object. RayActorError is left to the caller: the board may be back soon."""
        timeout_s = self._timeout_s if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            return ray.get(reference, timeout=timeout_s)
        except GetTimeoutError:
            raise WaitTimeoutError(
                f"weights: {doing} waited {self._timeout_s:g} s for the run's weight board; is its node alive "
                "(ray status), and its object store not full (ray memory)?"
            ) from None
        except RayActorError:
            raise
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, WeightsError):
                raise cause from None
            raise WeightsError(f"weights: {doing} failed: {_first_line(error)}; ask for the newest again") from error


def _put(value: Any) -> Any:
    """An object of this process's. Raises NoRoomError where its node has no room for it."""
    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise NoRoomError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
