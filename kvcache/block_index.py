"""Which slot of a pool holds which block, found by key."""

from collections.abc import Callable, Sequence
from itertools import repeat, takewhile
from operator import itemgetter
from typing import cast

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.hashing import BlockKey
from dynamo.tiers.tier import SlotIds

__all__ = ["BlockIndex"]

_NO_SLOTS: SlotIds = np.empty(0, dtype=np.int64)


class BlockIndex:
    """Keys and slots of registered blocks, each by the other. Not thread-safe: belongs to a pool.

    Attributes:
        slots: slot by key, in the order of registration. For reading; a `clear` makes another.
        is_registered: bool [num_slots]: which slots hold a registered block. For reading.
    """

    def __init__(self, num_slots: int) -> None:
        """Knows no block."""
        self.slots: dict[BlockKey, int] = {}
        self.is_registered = np.zeros(num_slots, dtype=np.bool_)
        self._keys: list[BlockKey | None] = [None] * num_slots  # of slots that are not registered: anything

    @property
    def has(self) -> Callable[[BlockKey], bool]:
        """`in` as a function for many keys, good until the index changes."""
        return self.slots.__contains__

    def count_prefix(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first on, are registered; takes half as long as to find them."""
        return len(list(takewhile(self.has, keys)))

    def find_prefix(self, keys: Sequence[BlockKey]) -> SlotIds:
        """Slots of the longest run of registered blocks from the first key on."""
        if not keys or keys[0] not in self.slots:
            return _NO_SLOTS
        slots = list(map(self.slots.get, keys))
        if None in slots:
            del slots[slots.index(None) :]
        return np.array(slots, dtype=np.int64)

    def locate(self, keys: Sequence[BlockKey]) -> SlotIds:
        """Slot of each key; -1 where it is not registered."""
        if not self.slots:
            return np.full(len(keys), -1, dtype=np.int64)
        return np.fromiter(map(self.slots.get, keys, repeat(-1)), dtype=np.int64, count=len(keys))

    def keys_of(self, slots: SlotIds) -> list[BlockKey]:
        """Keys of registered slots."""
        keys = self._keys
        if len(slots) < 2:
            return cast("list[BlockKey]", [keys[slot] for slot in slots.tolist()])
        return cast("list[BlockKey]", list(itemgetter(*slots.tolist())(keys)))

    def copy_of_keys(self) -> list[BlockKey | None]:
        """Key by slot; of slots that are not registered, anything."""
        return self._keys.copy()

    def add(self, keys: Sequence[BlockKey], slots: SlotIds) -> None:
        """Registers distinct slots, at least one, under distinct keys that are not registered."""
        numbers: list[int] = slots.tolist()
        self.slots.update(zip(keys, numbers, strict=True))
        if len(numbers) == 1:
            self._keys[numbers[0]] = keys[0]
        elif numbers[-1] - numbers[0] == len(numbers) - 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            self._keys[numbers[0] : numbers[-1] + 1] = keys
        else:
            for key, slot in zip(keys, numbers, strict=True):
                self._keys[slot] = key
        self.is_registered[slots] = True

    def add_unknown(self, keys: Sequence[BlockKey], slots: SlotIds) -> tuple[SlotIds, list[int]]:
        """Registers those of distinct keys that are not registered.

        Returns:
            The slot that each key has now, and the positions of those that are new.
        """
        canonical = slots.copy()
        new: list[int] = []
        for i, key in enumerate(keys):
            own = int(slots[i])
            known = self.slots.get(key)
            if known is None:
                self.slots[key] = own
                self._keys[own] = key
                self.is_registered[own] = True
                new.append(i)
            else:
                canonical[i] = known
        return canonical, new

    def restore(self, names: npt.NDArray[np.void], slots: SlotIds) -> None:
        """Fills an empty index: distinct keys, void16 [n], and a distinct slot for each."""
        self.is_registered[slots] = True
        taken = np.flatnonzero(self.is_registered)
        by_slot = np.empty(len(self.is_registered), dtype=np.int64)
        by_slot[slots] = np.arange(len(slots))
        keys: list[BlockKey] = names[by_slot[taken]].tolist()
        numbers: list[int] = taken.tolist()
        self.slots = dict(zip(keys, numbers, strict=True))
        if numbers and numbers[-1] == len(numbers) - 1:
            self._keys[: len(numbers)] = keys
        else:
            for slot, key in zip(numbers, keys, strict=True):
                self._keys[slot] = key

    def drop(self, slots: SlotIds) -> list[BlockKey]:
        """Takes registered slots out; returns their keys."""
        self.is_registered[slots] = False
        keys = self.keys_of(slots)
        index = self.slots
        for key in keys:
            del index[key]
        return keys

    def clear(self) -> dict[BlockKey, int]:
        """Takes all out, in a few array operations; returns what was there."""
        slots, self.slots = self.slots, {}
        self.is_registered[:] = False
        return slots

    def grow(self, num_slots: int) -> None:
        """Has room for slots up to `num_slots`."""
        added = num_slots - len(self._keys)
        self.is_registered = np.concatenate((self.is_registered, np.zeros(added, dtype=np.bool_)))
        self._keys += [None] * added

    def check_invariants(self) -> None:
        """Raises AssertionError if keys and slots disagree."""
        assert len(self.slots) == np.count_nonzero(self.is_registered), "index and registered slots differ in number"
        assert all(self._keys[slot] == key for key, slot in self.slots.items()), "index and slot disagree on a key"
