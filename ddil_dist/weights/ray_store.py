"""The cluster's weight store: versions as objects in Ray's object store, found through one small named actor.

The board owns what it keeps, so a version outlives the learner that published it. No collective joins learner and
actors: each pulls when it likes, so a dead or slow one stalls nobody.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from ddil_dist.errors import WaitTimeoutError, WeightsError
from ddil_dist.types import WeightsVersion
from ddil_dist.weights.flat import PackedWeights
from ddil_dist.weights.store import InMemoryWeightStore

NAMESPACE = "ddil"
TIMEOUT_S = 60.0


class WeightBoard:
    """Runs as a Ray actor without a CPU of its own: keeps references to the newest versions' objects."""

    def __init__(self) -> None:
        self._identities: dict[int, WeightsVersion] = {}
        self._objects: dict[int, Any] = {}

    def publish(self, packed: PackedWeights) -> None:
        version = packed.version.version
        newest = self.newest()
        if newest is not None and version <= newest.version:
            raise WeightsError(f"weights version {version} is not newer than {newest.version}")
        self._objects[version] = ray.put(packed)
        self._identities[version] = packed.version
        for old in sorted(self._objects)[: -InMemoryWeightStore.KEPT]:
            del self._objects[old], self._identities[old]

    def newest(self) -> WeightsVersion | None:
        return self._identities[max(self._identities)] if self._identities else None

    def find(self, version: int) -> list[Any]:
        """The version's object reference, in a list so that Ray does not fetch it here; [] if it is not kept."""
        return [self._objects[version]] if version in self._objects else []


def start_board(run: str) -> Any:
    """Start the run's board; it ends with the process that started it."""
    remote = ray.remote(num_cpus=0, max_restarts=0)(WeightBoard)
    return remote.options(name=f"ddil-{run}-weights", namespace=NAMESPACE).remote()


class RayWeightStore:
    """A client of the board, with a deadline on every call."""

    def __init__(self, board: Any, *, timeout_s: float = TIMEOUT_S) -> None:
        self._board = board
        self._timeout_s = timeout_s

    def publish(self, packed: PackedWeights) -> None:
        self._get(self._board.publish.remote(packed), f"publishing version {packed.version.version}")

    def newest(self) -> WeightsVersion | None:
        newest = self._get(self._board.newest.remote(), "asking for the newest version")
        assert newest is None or isinstance(newest, WeightsVersion)
        return newest

    def load(self, version: int) -> PackedWeights:
        found = self._get(self._board.find.remote(version), f"asking for version {version}")
        if not found:
            raise WeightsError(f"weights version {version} is not kept any more; ask for the newest")
        packed = self._get(found[0], f"fetching version {version}")
        assert isinstance(packed, PackedWeights)
        return packed

    def _get(self, reference: Any, doing: str) -> Any:
        try:
            return ray.get(reference, timeout=self._timeout_s)
        except GetTimeoutError:
            raise WaitTimeoutError(
                f"weights: {doing} waited {self._timeout_s:g} s for the run's weight board; is its node alive "
                "(ray status)?"
            ) from None
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, WeightsError):
                raise cause from None
            raise WeightsError(f"weights: {doing} failed, the run's weight board is gone: {error}") from error
