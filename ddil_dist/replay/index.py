"""Which slots hold which states: the client's mirror of a buffer, for stratified draws at O(1) per item.

Every live slot is a member of one group: the states of one source, timestep, policy version and what the metadata holds
besides. A draw selects groups by their columns (a few hundred at most), then items by one uniform number each: nothing
scales with the number of states. Invariant: members[slot_group[slot]][slot_place[slot]] == slot for every live slot,
and -1 groups are empty.

    index = SlotIndex()
    index.set(7, (StateSource.STUDENT, 999, 20))
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

Key = tuple[int, ...]
"""Of a group: source, timestep, policy version, and what the metadata holds besides."""

EMPTY: Final = 255
"""`source` of a slot that holds nothing."""


class SlotIndex:
    """Groups of slots by their keys, of `num_keys` parts each. Not thread-safe."""

    def __init__(self, num_keys: int = 3) -> None:
        self._num_keys = num_keys
        self.clear()

    def clear(self) -> None:
        """Forget every slot."""
        self._slot_group = array("i")
        self._slot_place = array("I")
        self._groups: dict[Key, int] = {}
        self._keys: list[Key | None] = []
        self._members: list[array[int]] = []
        self._free: list[int] = []
        self._columns = np.zeros((self._num_keys + 1, 16), np.int64)  # the keys' parts, and the number of members

    def __len__(self) -> int:
        """Number of live slots."""
        return int(self._columns[-1, : len(self._members)].sum())

    def set(self, slot: int, key: Key | None) -> None:
        """Note what a slot holds from now on; None: nothing."""
        if slot >= len(self._slot_group):
            more = max(1024, len(self._slot_group), slot + 1 - len(self._slot_group))
            self._slot_group.extend(array("i", [-1]) * more)
            self._slot_place.extend(array("I", [0]) * more)
        old = self._slot_group[slot]
        if old >= 0:
            self._leave(slot, old)
        if key is None:
            self._slot_group[slot] = -1
            return
        group = self._groups.get(key)
        if group is None:
            group = self._new_group(key)
        members = self._members[group]
        self._slot_group[slot] = group
        self._slot_place[slot] = len(members)
        members.append(slot)
        self._columns[-1, group] = len(members)

    def apply(self, entries: npt.NDArray[Any]) -> None:
        """Follow a shard's log. entries: [N] of `Codec.log_dtype`, oldest first."""
        for slot, (*key, _size) in entries.tolist():
            self.set(slot, None if key[0] == EMPTY else tuple(key))

    def load(self, meta: npt.NDArray[Any]) -> None:
        """Start anew from what every slot holds. meta: [slots] of `Codec.meta_dtype`."""
        self.clear()
        num = len(meta)
        live = np.flatnonzero(meta["source"] != EMPTY)
        group_of, place_of = np.full(num, -1, np.int32), np.zeros(num, np.uint32)
        parts = [meta[name][live] for name in (meta.dtype.names or ())[: self._num_keys]]
        order = np.lexsort(parts[::-1])
        differs = np.zeros(len(live) + 1, bool)
        differs[[0, -1]] = len(live) > 0
        for part in parts:
            differs[1:-1] |= np.diff(part[order].astype(np.int64)) != 0
        for begin, end in pairwise(np.flatnonzero(differs)):
            chosen = live[order[begin:end]]
            group = self._new_group(tuple(int(part[order[begin]]) for part in parts))
            self._members[group] = array("I", chosen.astype(np.uint32).tobytes())
            self._columns[-1, group] = end - begin
            group_of[chosen], place_of[chosen] = group, np.arange(end - begin)
        self._slot_group, self._slot_place = array("i", group_of.tobytes()), array("I", place_of.tobytes())

    def count(self, draw: Draw, *, newest: int, staleness: int | None) -> int:
        """Number of live slots that a draw may choose from."""
        return int(self._columns[-1, self._matching(draw, newest, staleness)].sum())

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
        ends = np.cumsum(self._columns[-1, groups])
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
            nothing = (EMPTY,) + (0,) * (self._num_keys - 1)
            group = self._new_group(nothing if key is None else tuple(key))
            for slot in slots:
                self.set(slot, None if key is None else tuple(key))
            if key is None:
                del self._groups[nothing]
                self._keys[group] = None
        self._free = list(state["free"])

    def _matching(self, draw: Draw, newest: int, staleness: int | None) -> npt.NDArray[np.int64]:
        """Non-empty groups that fit a draw, in order of creation."""
        source, timestep, version, *_, members = self._columns[:, : len(self._members)]
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

    def _new_group(self, key: Key) -> int:
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
        self._columns[-1, group] = len(members)
        if not members:
            key = self._keys[group]
            assert key is not None
            del self._groups[key]
            self._keys[group] = None
            self._free.append(group)
