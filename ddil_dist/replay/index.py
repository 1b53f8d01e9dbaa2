"""Which slots hold which states: the client's mirror of a buffer, for stratified draws at O(1) per item.

Every live slot is a member of one group, the states of one (source, timestep, policy version). A draw selects groups
by their columns (a few hundred at most), then items by one uniform number each: nothing scales with the number of
states. Invariant: members[slot_group[slot]][slot_place[slot]] == slot for every live slot, and -1 groups are empty.

    index = SlotIndex()
    index.set(7, source=1, timestep=999, version=20)
    slots = index.choose(Draw(64, sources=frozenset({StateSource.STUDENT})), 64, newest=40, staleness=None, rng=rng)
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ddil_dist.types import NO_POLICY, Draw

META_DTYPE: Final = np.dtype(
    [("source", "u1"), ("flags", "u1"), ("timestep", "<i2"), ("version", "<i4"), ("size", "<u4")]
)
"""Twelve bytes that tell of a slot what draws need to know."""

LOG_DTYPE: Final = np.dtype([("slot", "<u4"), ("meta", META_DTYPE)])
"""An entry of a shard's log: a slot and what it holds from then on."""

EMPTY: Final = 255
"""`source` of a slot that holds nothing."""


class SlotIndex:
    """Groups of slots by (source, timestep, policy version). Not thread-safe."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget every slot."""
        self._slot_group = array("i")
        self._slot_place = array("I")
        self._groups: dict[tuple[int, int, int], int] = {}
        self._keys: list[tuple[int, int, int] | None] = []
        self._members: list[array[int]] = []
        self._free: list[int] = []
        self._columns = np.zeros((4, 16), np.int64)  # source, timestep, version, number of members

    def __len__(self) -> int:
        """Number of live slots."""
        return int(self._columns[3, : len(self._members)].sum())

    def set(self, slot: int, *, source: int, timestep: int, version: int) -> None:
        """Note what a slot holds from now on; `source` EMPTY: nothing."""
        if slot >= len(self._slot_group):
            more = max(1024, len(self._slot_group), slot + 1 - len(self._slot_group))
            self._slot_group.extend(array("i", [-1]) * more)
            self._slot_place.extend(array("I", [0]) * more)
        old = self._slot_group[slot]
        if old >= 0:
            self._leave(slot, old)
        if source == EMPTY:
            self._slot_group[slot] = -1
            return
        key = (source, timestep, version)
        group = self._groups.get(key)
        if group is None:
            group = self._new_group(key)
        members = self._members[group]
        self._slot_group[slot] = group
        self._slot_place[slot] = len(members)
        members.append(slot)
        self._columns[3, group] = len(members)

    def apply(self, entries: npt.NDArray[Any]) -> None:
        """Follow a shard's log. entries: [N] of LOG_DTYPE, oldest first."""
        for slot, (source, _, timestep, version, _) in entries.tolist():
            self.set(slot, source=source, timestep=timestep, version=version)

    def load(self, meta: npt.NDArray[Any]) -> None:
        """Start anew from what every slot holds. meta: [slots] of META_DTYPE."""
        self.clear()
        num = len(meta)
        live = np.flatnonzero(meta["source"] != EMPTY)
        group_of, place_of = np.full(num, -1, np.int32), np.zeros(num, np.uint32)
        keys = np.stack([meta[name][live].astype(np.int64) for name in ("source", "timestep", "version")], axis=1)
        packed = (keys[:, 0] << 56) + ((keys[:, 1] + 2**15) << 32) + (keys[:, 2] + 2**31)
        order = np.argsort(packed, kind="stable")
        edges = np.flatnonzero(np.diff(packed[order], prepend=-1, append=-1))
        for begin, end in pairwise(edges):
            chosen = live[order[begin:end]]
            source, timestep, version = keys[order[begin]].tolist()
            group = self._new_group((source, timestep, version))
            self._members[group] = array("I", chosen.astype(np.uint32).tobytes())
            self._columns[3, group] = end - begin
            group_of[chosen], place_of[chosen] = group, np.arange(end - begin)
        self._slot_group, self._slot_place = array("i", group_of.tobytes()), array("I", place_of.tobytes())

    def count(self, draw: Draw, *, newest: int, staleness: int | None) -> int:
        """Number of live slots that a draw may choose from."""
        return int(self._columns[3, self._matching(draw, newest, staleness)].sum())

    def choose(
        self, draw: Draw, num: int, *, newest: int, staleness: int | None, rng: np.random.Generator
    ) -> tuple[list[int], npt.NDArray[np.int64]]:
        """`num` slots, uniform with replacement over those that fit the draw, and how many are of each source.

        newest: newest policy version, from which ages count. staleness: greatest age, None without bound.
        The draw must fit some slot (see `count`) where num is positive. The counts are indexed by source.
        """
        if num == 0:
            return [], np.zeros(0, np.int64)
        groups = self._matching(draw, newest, staleness)
        ends = np.cumsum(self._columns[3, groups])
        picks = rng.integers(0, ends[-1], num)
        which = np.searchsorted(ends, picks, side="right")
        places = ends[which] - 1 - picks
        chosen = groups[which]
        members = self._members
        slots = [members[g][p] for g, p in zip(chosen.tolist(), places.tolist(), strict=True)]
        return slots, np.bincount(self._columns[0, chosen])

    def state(self) -> dict[str, Any]:
        """Groups and members in their order, as plain data: with it, later draws are the same."""
        return {"keys": list(self._keys), "members": [m.tolist() for m in self._members], "free": list(self._free)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` described."""
        self.clear()
        for key, slots in zip(state["keys"], state["members"], strict=True):
            source, timestep, version = (EMPTY, 0, 0) if key is None else key
            group = self._new_group((source, timestep, version))
            for slot in slots:
                self.set(slot, source=source, timestep=timestep, version=version)
            if key is None:
                del self._groups[EMPTY, 0, 0]
                self._keys[group] = None
        self._free = list(state["free"])

    def _matching(self, draw: Draw, newest: int, staleness: int | None) -> npt.NDArray[np.int64]:
        """Non-empty groups that fit a draw, in order of creation."""
        source, timestep, version, members = self._columns[:, : len(self._members)]
        fits = members > 0
        if draw.sources is not None:
            fits &= np.isin(source, [int(s) for s in draw.sources])
        if draw.timesteps is not None:
            fits &= np.isin(timestep, list(draw.timesteps))
        if staleness is not None or draw.min_age is not None or draw.max_age is not None:
            ages = np.where(version == NO_POLICY, 0, np.maximum(newest - version, 0))
            for bound in (staleness, draw.max_age):
                if bound is not None:
                    fits &= ages <= bound
            if draw.min_age is not None:
                fits &= ages >= draw.min_age
        return np.flatnonzero(fits)

    def _new_group(self, key: tuple[int, int, int]) -> int:
        if self._free:
            group = self._free.pop()
        else:
            group = len(self._members)
            self._members.append(array("I"))
            self._keys.append(None)
            if group >= self._columns.shape[1]:
                self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._groups[key] = group
        self._keys[group] = key
        self._columns[:, group] = (*key, 0)
        return group

    def _leave(self, slot: int, group: int) -> None:
        """Take a slot out of its group: the group's last member takes its place."""
        members, place = self._members[group], self._slot_place[slot]
        last = members.pop()
        if last != slot:
            members[place] = last
            self._slot_place[last] = place
        self._columns[3, group] = len(members)
        if not members:
            key = self._keys[group]
            assert key is not None
            del self._groups[key]
            self._keys[group] = None
            self._free.append(group)
