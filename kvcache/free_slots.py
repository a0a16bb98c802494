"""The slots of a pool that hold nothing and belong to nobody."""

import numpy as np

from dynamo.tiers.tier import SlotIds

__all__ = ["FreeSlots"]

_NO_SLOTS: SlotIds = np.empty(0, dtype=np.int64)


class FreeSlots:
    """A stack, so that low slots and those used last go first. Not thread-safe: belongs to a pool.

    Attributes:
        count: slots that `take` could give.
        withheld: free slots that are not to be used for a while.
    """

    def __init__(self, num_slots: int) -> None:
        """All of them are free."""
        self.count = num_slots
        self.withheld = _NO_SLOTS
        self._stack = np.arange(num_slots - 1, -1, -1, dtype=np.int64)  # popping from the end gives 0, 1, 2 ...
        self._limit = num_slots

    @property
    def slots(self) -> SlotIds:
        """Those that `take` could give, the last first."""
        return self._stack[: self.count]

    def take(self, count: int) -> SlotIds:
        """Takes `count` of the slots that are there."""
        top = self.count
        self.count = top - count
        return self._stack[top - count : top][::-1].copy()

    def push(self, slots: SlotIds) -> None:
        """Makes slots free, the first of them the next to be taken; those beyond the limit are gone."""
        if self._limit < len(self._stack):
            slots = slots[slots < self._limit]
        top = self.count
        self._stack[top : top + len(slots)] = slots[::-1]
        self.count = top + len(slots)

    def withhold(self, first: int) -> None:
        """Takes the free ones of the slots from `first` on out of use, until `put_back`."""
        self.withheld = np.concatenate((self.withheld, self._cut(first)))

    def put_back(self) -> None:
        """Makes withheld slots free again."""
        withheld, self.withheld = self.withheld, _NO_SLOTS
        self.push(withheld)

    def limit(self, num_slots: int) -> None:
        """Slots from `num_slots` on are given to nobody from now on; new ones below it come with `push`."""
        added = num_slots - len(self._stack)
        if added > 0:
            self._stack = np.concatenate((self._stack, np.zeros(added, dtype=np.int64)))
        self._limit = num_slots
        self._cut(num_slots)

    def clear(self) -> None:
        """None is free."""
        self.count = 0

    def _cut(self, first: int) -> SlotIds:
        """Takes those from `first` on off the stack."""
        free = self.slots
        beyond = free >= first
        cut, kept = free[beyond], free[~beyond]
        self._stack[: len(kept)] = kept
        self.count = len(kept)
        return cut
