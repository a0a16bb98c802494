"""Which block of a pool continues which, so that none is given up before those behind it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.events import RunStarts
from dynamo.kvcache.hashing import BlockKey
from dynamo.tiers.tier import SlotIds

__all__ = ["NO_PARENT", "Lineage", "named_runs", "runs_of_slots", "slots_behind"]

NO_PARENT = -1


class Lineage:
    """Parents, and numbers of children, of the registered blocks of a pool, by slot. Not thread-safe: belongs to a pool.

    A block whose parent is not registered, since it was lost or is still on its way, is an *orphan*: it counts as nobody's
    child until its parent is registered, and is adopted then.
    """

    def __init__(self, num_slots: int) -> None:
        self._parent = np.full(num_slots, NO_PARENT, dtype=np.int32)
        self._num_children = np.zeros(num_slots, dtype=np.int32)
        self._orphans: dict[BlockKey, set[int]] = {}  # slots, by the key of the parent they lack
        self._lacking: dict[int, BlockKey] = {}  # the same by slot

    @property
    def num_orphans(self) -> int:
        """Blocks whose parent is not registered."""
        return len(self._lacking)

    def parent(self, slot: int) -> int | None:
        """Slot of the parent; None for a chain's first block, and for an orphan."""
        parent = int(self._parent[slot])
        return None if parent == NO_PARENT else parent

    def lacks(self, slot: int) -> BlockKey | None:
        """Key of the parent that an orphan lacks."""
        return self._lacking.get(slot)

    def orphans(self) -> dict[int, BlockKey]:
        """The parents that orphans lack, by the orphan's slot; a copy."""
        return self._lacking.copy()

    def num_children(self, slot: int) -> int:
        """How many registered blocks continue this one."""
        return int(self._num_children[slot])

    def append(self, slots: SlotIds, parent: int) -> None:
        """Adds childless blocks that follow one another, the first one after `parent`."""
        first = slots[0]
        if len(slots) > 1:
            self._parent[slots[1:]] = slots[:-1]
            self._num_children[slots[:-1]] = 1
        self._parent[first] = parent
        if parent != NO_PARENT:
            self._num_children[parent] += 1

    def add(self, slots: SlotIds, parents: npt.NDArray[np.signedinteger]) -> None:
        """Adds childless blocks, each after the parent at the same place, NO_PARENT for none."""
        self._parent[slots] = parents
        np.add.at(self._num_children, parents[parents != NO_PARENT], 1)

    def add_orphan(self, slot: int, lacks: BlockKey) -> None:
        """Says that a block, added without a parent, has one that is not registered."""
        self._lacking[slot] = lacks
        self._orphans.setdefault(lacks, set()).add(slot)

    def adopt(self, keys: Iterable[BlockKey], slots: SlotIds) -> None:
        """Gives orphans back to parents that are registered now."""
        if not self._orphans:
            return
        for key, slot in zip(keys, slots.tolist(), strict=True):
            for child in self._orphans.pop(key, ()):
                del self._lacking[child]
                self._parent[child] = slot
                self._num_children[slot] += 1

    def first_leaf(self, slots: SlotIds) -> int | None:
        """Position of the first of `slots`, which are not empty, that has no children."""
        if not self._num_children[slots[0]]:
            return 0
        leaves = np.flatnonzero(self._num_children[slots] == 0)
        return int(leaves[0]) if len(leaves) else None

    def cut(self, slots: SlotIds) -> tuple[int, int]:
        """Removes a leaf, `slots[0]`, and of the following ones those that are each the parent of no other than the last.

        Returns:
            How many blocks were removed, and the slot of a parent that has no children any more, NO_PARENT for none.
        """
        count = len(slots)
        if count > 1:
            goes_on = self._parent[slots[:-1]] == slots[1:]
            goes_on &= self._num_children[slots[1:]] == 1
            if np.count_nonzero(goes_on) < count - 1:
                count = int(goes_on.argmin()) + 1
        removed = slots[:count]
        last = int(removed[-1])
        parent = int(self._parent[last])
        self._parent[removed] = NO_PARENT
        self._num_children[removed] = 0
        if self._lacking:
            self._forget_orphan(last)
        if parent == NO_PARENT:
            return count, NO_PARENT
        left = self._num_children[parent] - 1
        self._num_children[parent] = left
        return count, NO_PARENT if left else parent

    def remove(self, slots: SlotIds, keys: Sequence[BlockKey]) -> SlotIds:
        """Removes blocks wherever they stand. Their children become orphans. Cost: proportional to the number of slots.

        Returns:
            Slots of the parents that have no children any more.
        """
        children = self.children(slots)
        if len(children):  # rare: whoever removes blocks removes those that continue them, as far as nobody holds these
            key_of = dict(zip(slots.tolist(), keys, strict=True))
            for child in children.tolist():
                self.add_orphan(child, key_of[int(self._parent[child])])
            self._parent[children] = NO_PARENT
        if self._lacking:
            for slot in slots.tolist():
                self._forget_orphan(slot)
        parents = self._parent[slots]
        parents = parents[parents != NO_PARENT]
        np.subtract.at(self._num_children, parents, 1)
        self._num_children[slots] = -1
        opened: SlotIds = parents[self._num_children[parents] == 0].astype(np.int64)
        self._num_children[slots] = 0
        self._parent[slots] = NO_PARENT
        return opened

    def children(self, slots: SlotIds) -> SlotIds:
        """The children of `slots` that are not among them. Cost: proportional to the number of slots, if there are any."""
        num_children = int(self._num_children[slots].sum())
        if not num_children:
            return slots[:0]
        if np.count_nonzero(np.isin(self._parent[slots], slots)) == num_children:
            return slots[:0]
        among = np.zeros(len(self._parent) + 1, dtype=np.bool_)  # one more, at -1: no parent
        among[slots] = True
        return np.flatnonzero(among[self._parent] & ~among[:-1])

    def parents(self) -> npt.NDArray[np.int32]:
        """Slot of each slot's parent, NO_PARENT for none; a copy."""
        return self._parent.copy()

    def clear(self) -> None:
        """Removes all blocks."""
        self._parent[:] = NO_PARENT
        self._num_children[:] = 0
        self._orphans.clear()
        self._lacking.clear()

    def restore(self, slots: SlotIds, parents: SlotIds) -> None:
        """`add` for an unused pool: the parents may be among `slots`."""
        self._parent[slots] = parents
        self._num_children += np.bincount(parents[parents != NO_PARENT], minlength=len(self._parent)).astype(np.int32)

    def grow(self, num_slots: int) -> None:
        """Has room for slots up to `num_slots`."""
        added = num_slots - len(self._parent)
        self._parent = np.concatenate((self._parent, np.full(added, NO_PARENT, dtype=np.int32)))
        self._num_children = np.concatenate((self._num_children, np.zeros(added, dtype=np.int32)))

    def check_invariants(self, is_registered: npt.NDArray[np.bool_]) -> None:
        """Raises AssertionError if counts and links disagree, or a block that is not registered has any."""
        linked = self._parent[self._parent != NO_PARENT]
        counted = np.bincount(linked, minlength=len(self._parent))
        assert (counted == self._num_children).all(), "numbers of children and links to parents differ"
        assert is_registered[linked].all(), "a registered block's parent is not registered"
        assert is_registered[self._parent != NO_PARENT].all(), "a block that is not registered has a parent"
        pairs = {(slot, key) for key, slots in self._orphans.items() for slot in slots}
        assert pairs == set(self._lacking.items()), "the two lists of orphans differ"
        orphans = np.array(list(self._lacking), dtype=np.int64)
        assert is_registered[orphans].all(), "an orphan is not registered"
        assert (self._parent[orphans] == NO_PARENT).all(), "an orphan has a parent"

    def _forget_orphan(self, slot: int) -> None:
        key = self._lacking.pop(slot, None)
        if key is not None:
            siblings = self._orphans[key]
            siblings.discard(slot)
            if not siblings:
                del self._orphans[key]


def slots_behind(parents: npt.NDArray[np.int32], first: int) -> SlotIds:
    """Slots from `first` on, and of all blocks that continue what lies there, each before its parent.

    By pointer jumping (https://en.wikipedia.org/wiki/Pointer_jumping), as many rounds as the logarithm of the longest chain.

    Args:
        parents: slot of each slot's parent, NO_PARENT for none; no rings.
    """
    count = len(parents)
    above = np.append(np.where(parents == NO_PARENT, count, parents), count)  # one more, its own parent, above all
    depth = (above != count).astype(np.int32)
    is_behind = np.arange(count + 1) >= first
    is_behind[count] = False
    while (above != count).any():
        is_behind |= is_behind[above]
        depth += depth[above]
        above = above[above]
    slots = np.flatnonzero(is_behind)
    return slots[np.argsort(-depth[slots], kind="stable")]


def runs_of_slots(slots: SlotIds, parents: npt.NDArray[np.int32]) -> list[list[int]]:
    """All of `slots` in runs of which each block continues the one before, a run's parent always in an earlier run.

    Args:
        parents: slot of each slot's parent, NO_PARENT for none; no rings. A parent of one of `slots` is among them.
    """
    next_of = [NO_PARENT] * len(parents)
    others: dict[int, list[int]] = {}  # what continues a slot besides `next_of`
    waiting: list[int] = []
    for slot, parent in zip(slots.tolist(), parents[slots].tolist(), strict=True):
        if parent == NO_PARENT:
            waiting.append(slot)
        elif next_of[parent] == NO_PARENT:
            next_of[parent] = slot
        else:
            others.setdefault(parent, []).append(slot)
    runs = []
    while waiting:
        slot = waiting.pop()
        run = []
        while slot != NO_PARENT:
            run.append(slot)
            if slot in others:
                waiting += others[slot]
            slot = next_of[slot]
        runs.append(run)
    return runs


def named_runs(
    slots: SlotIds, names: Sequence[BlockKey | None], parents: npt.NDArray[np.int32], lacking: Mapping[int, BlockKey]
) -> tuple[list[BlockKey], RunStarts]:
    """Keys of registered slots in runs, and where these start, as in a `Snapshot`.

    Args:
        names: key by slot.
        parents: as for `runs_of_slots`.
        lacking: of orphans, by slot, the parents' keys.
    """
    keys: list[BlockKey | None] = []
    starts: list[tuple[int, BlockKey | None]] = []
    for run in runs_of_slots(slots, parents):
        parent = int(parents[run[0]])
        starts.append((len(keys), lacking.get(run[0]) if parent == NO_PARENT else names[parent]))
        keys += [names[slot] for slot in run]
    return cast("list[BlockKey]", keys), starts
