"""The cluster's weight store: versions as objects in Ray's object store, found through one small named actor.

The board owns what it keeps, so a version outlives the learner that published it. No collective joins learner and
actors: each pulls when it likes, so a dead or slow one stalls nobody. A board that dies is started again, empty:
readers see nothing new and keep what they have applied, until the learner publishes again.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from ddil_dist.errors import WaitTimeoutError, WeightsError
from ddil_dist.on_ray import NAMESPACE, actor_name, on_this_node
from ddil_dist.types import WeightsVersion
from ddil_dist.weights.board import WeightBoard
from ddil_dist.weights.flat import PackedWeights

TIMEOUT_S = 60.0
RETRY_S = 0.2
LOOK_S = 2.0
"""Shortest time between two looks whether the board has lost what it held."""
BOARD_THREADS = 8


class RayWeightBoard(WeightBoard):
    """Runs as a Ray actor without a CPU of its own, with a few threads: readers do not wait for a publisher."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(lambda reference: ray.put(ray.get(reference, timeout=timeout_s)))


def start_board(run: str, *, timeout_s: float = TIMEOUT_S) -> Any:
    """Start the run's board, here. Restarted, empty, whenever it dies; it ends with the process that started it."""
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=BOARD_THREADS)(RayWeightBoard)
    options = {"name": actor_name(run, "weights"), "namespace": NAMESPACE, "scheduling_strategy": on_this_node()}
    return remote.options(**options).remote(timeout_s)


class RayWeightStore:
    """A client of the board, with a deadline on every call."""

    def __init__(self, board: Any, *, timeout_s: float = TIMEOUT_S) -> None:
        self._board = board
        self._timeout_s = timeout_s
        self._last: PackedWeights | None = None
        self._next_look = 0.0

    def publish(self, packed: PackedWeights) -> None:
        """Returns when the board owns a copy; readers see the version before. A board that is restarting is awaited."""
        doing = f"publishing version {packed.version.version}"
        deadline = time.monotonic() + self._timeout_s
        try:
            held = ray.put(packed)
        except RayError as error:
            raise WeightsError(
                f"weights: {doing} found no room for {packed.version.size_bytes} bytes in this node's object store: "
                f"{_first_line(error)}; give it room for four versions (ray start --object-store-memory)"
            ) from error
        while True:
            try:
                self._get(self._board.publish.remote(packed.version, [held]), doing, deadline)
                break
            except RayActorError as error:
                if time.monotonic() + RETRY_S > deadline:
                    raise WaitTimeoutError(
                        f"weights: {doing} waited {self._timeout_s:g} s for the run's weight board, which did not come "
                        f"back (see ray list actors): {_first_line(error)}"
                    ) from error
                time.sleep(RETRY_S)
        self._last = packed

    def republish_if_lost(self) -> bool:
        """Publish again what this client published last, if the board lost it in a restart; whether it did.

        To be called often: it asks the board every LOOK_S. Only while nothing else was packed into the same buffer.
        """
        now = time.monotonic()
        if self._last is None or now < self._next_look:
            return False
        self._next_look = now + LOOK_S
        if self.newest() is not None:
            return False
        self.publish(self._last)
        return True

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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
