"""Where published weights are kept: the protocol, and the store of one process. `ray_store` has the cluster's."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from ddil_dist.errors import WeightsError
from ddil_dist.types import WeightsVersion
from ddil_dist.weights.flat import PackedWeights


class WeightStore(Protocol):
    """Versioned weights. Versions rise strictly; only the newest two can be loaded."""

    def publish(self, packed: PackedWeights) -> None:
        """Make a copy of a version the newest. Raises WeightsError unless it is newer than all before."""

    def newest(self) -> WeightsVersion | None:
        """Identity of the newest version; None before the first, or while the store cannot say."""

    def load(self, version: int) -> PackedWeights:
        """A version's weights. Raises WeightsError if it is not kept any more, or cannot be had now."""


class InMemoryWeightStore:
    """The store of a run in one process."""

    KEPT = 2

    def __init__(self) -> None:
        self._versions: dict[int, PackedWeights] = {}

    def publish(self, packed: PackedWeights) -> None:
        newest = self.newest()
        if newest is not None and packed.version.version <= newest.version:
            raise WeightsError(f"weights version {packed.version.version} is not newer than {newest.version}")
        buffer = packed.buffer.copy()
        buffer.flags.writeable = False
        self._versions[packed.version.version] = replace(packed, buffer=buffer)
        while len(self._versions) > self.KEPT:
            del self._versions[min(self._versions)]

    def newest(self) -> WeightsVersion | None:
        return self._versions[max(self._versions)].version if self._versions else None

    def load(self, version: int) -> PackedWeights:
        if version not in self._versions:
            raise WeightsError(f"weights version {version} is not kept; kept are {sorted(self._versions)}")
        return self._versions[version]
