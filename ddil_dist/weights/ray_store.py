"""The cluster's weight store: versions as objects in Ray's object store, found through one small named actor.

The board owns what it keeps, so a version outlives the learner that published it. No collective joins learner and
actors: each pulls when it likes, so a dead or slow one stalls nobody. A board that dies is started again, empty:
readers see nothing new and keep what they have applied, until the learner publishes again.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayActorError, RayError

from ddil_dist.errors import WaitTimeoutError, WeightsError
from ddil_dist.on_ray import NAMESPACE, actor_name, on_this_node
from ddil_dist.types import WeightsVersion
from ddil_dist.weights.board import NoRoomError, WeightBoard
from ddil_dist.weights.flat import PackedWeights

TIMEOUT_S = 60.0
RETRY_S = 0.2
ROOM_S = 5.0
BOARD_THREADS = 8
REMEDY = "give the object stores room for four versions (ray start --object-store-memory)"

logger = logging.getLogger(__name__)


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
