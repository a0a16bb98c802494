"""Slots of one tier: which are free, which hold which block, who uses them, and which is given up next."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from dynamo.kvcache.hashing import BlockKey
from dynamo.tiers.tier import SlotIds

__all__ = ["Allocation", "BlockPool", "Registration"]

_NO_SLOTS: SlotIds = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Slots taken, and the blocks that were evicted for them with the slots those lay in."""

    slots: SlotIds
    evicted_keys: list[BlockKey]
    evicted_slots: SlotIds


@dataclass(frozen=True, slots=True)
class Registration:
    """Where blocks can be found now, one slot for each key, and the positions of the keys that were not known before."""

    slots: SlotIds
    new: Sequence[int]


class BlockPool:
    """Reference counts, content index and eviction order of one tier's slots. Not thread-safe: its owner holds a lock.

    A slot is in one of four states:

        free ──allocate──► used, unregistered ──register──► used, registered ──release──► idle ──evict──► free
          ▲                      │ release                                ▲─────acquire─────┘
          └──────────────────────┘

    Only this class changes reference counts. Eviction is leaf-first LRU: `release` and `touch` take slots in chain order
    and file them as one *run*, last block first, behind all earlier runs. Whoever uses a block uses its whole prefix with
    it, so a parent is never filed before its child. A slot that is used again leaves its place in the old run stale; stale
    places are recognised by the slot's stamp, which names the only run in which the slot counts. Filing a run of n slots is
    a few array operations, whatever n is.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evicted = 0
        self._free = np.arange(num_slots - 1, -1, -1, dtype=np.int64)  # a stack; popping from the end gives 0, 1, 2 ...
        self._num_free = num_slots
        self._num_idle = 0
        self._withheld = _NO_SLOTS
        self._refs = np.zeros(num_slots, dtype=np.int32)
        self._stamp = np.zeros(num_slots, dtype=np.int64)  # number of the run an idle slot is in; 0: not idle
        self._registered = np.zeros(num_slots, dtype=np.bool_)
        self._keys: list[BlockKey | None] = [None] * num_slots
        self._index: dict[BlockKey, int] = {}
        self._runs: deque[tuple[int, SlotIds]] = deque()
        self._last_run = 0
        self._filed_slots = 0  # places in _runs, stale ones included

    def __len__(self) -> int:
        """Blocks that can be found by key."""
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    @property
    def num_available(self) -> int:
        """Slots that `allocate` could give now: free and idle ones."""
        return self._num_free + self._num_idle

    @property
    def num_free(self) -> int:
        """Slots that `allocate` could give without evicting anything."""
        return self._num_free

    @property
    def num_pinned(self) -> int:
        """Slots somebody holds."""
        return self.num_slots - self._num_free - self._num_idle - len(self._withheld)

    @property
    def num_places(self) -> int:
        """Places in the order of eviction, stale ones included: what the order costs in memory."""
        return self._filed_slots

    def find(self, key: BlockKey) -> int | None:
        """Slot of a registered block. The slot is not pinned."""
        return self._index.get(key)

    def find_prefix(self, keys: Sequence[BlockKey]) -> SlotIds:
        """Slots of the longest run of registered blocks from the first key on. They are not pinned."""
        get = self._index.get
        slots: list[int] = []
        append = slots.append
        for key in keys:
            slot = get(key)
            if slot is None:
                break
            append(slot)
        return np.array(slots, dtype=np.int64)

    def find_any(self, keys: Sequence[BlockKey]) -> SlotIds:
        """Slots of those of the distinct `keys` that are registered, in their order. They are not pinned."""
        slots = self.locate(keys)
        return slots[slots >= 0]

    def locate(self, keys: Sequence[BlockKey]) -> SlotIds:
        """Slot of each key; -1 where it is not registered. They are not pinned."""
        if not self._index:
            return np.full(len(keys), -1, dtype=np.int64)
        return np.fromiter(map(self._index.get, keys, repeat(-1)), dtype=np.int64, count=len(keys))

    def keys(self) -> list[BlockKey]:
        """All registered keys, oldest registration first."""
        return list(self._index)

    def acquire(self, slots: SlotIds) -> None:
        """Adds one reference to each of the distinct, registered or used `slots`."""
        self._num_idle -= int(np.count_nonzero(self._stamp[slots]))
        self._stamp[slots] = 0
        self._refs[slots] += 1

    def release(self, slots: SlotIds) -> None:
        """Takes one reference from each of the distinct `slots`, given in chain order.

        A slot without references left becomes idle if it is registered, else free.
        """
        refs = self._refs[slots] - 1
        self._refs[slots] = refs
        unused = slots[refs == 0]
        registered = self._registered[unused]
        idle = unused[registered]
        if len(idle) < len(unused):
            self._push_free(unused[~registered])
        if len(idle):
            self._num_idle += len(idle)
            self._file(idle)

    def touch(self, slots: SlotIds) -> None:
        """Makes the idle ones of the distinct `slots`, given in chain order, the last to be evicted."""
        idle = slots[self._stamp[slots] != 0]
        if len(idle):
            self._file(idle)

    def allocate(self, count: int) -> Allocation | None:
        """Takes `count` slots, each with one reference, evicting idle blocks as needed: all of them or, as None, none."""
        if count > self.num_available:
            return None
        evicted_keys, evicted_slots = self._evict(max(0, count - self._num_free))
        top = self._num_free
        slots = self._free[top - count : top][::-1].copy()
        self._num_free = top - count
        self._refs[slots] = 1
        return Allocation(slots, evicted_keys, evicted_slots)

    def withhold(self, first: int) -> None:
        """Takes the free ones of the slots from `first` on out of use, until `put_back`."""
        free = self._free[: self._num_free]
        beyond = free >= first
        self._withheld = np.concatenate((self._withheld, free[beyond]))
        kept = free[~beyond].copy()
        self._free[: len(kept)] = kept
        self._num_free = len(kept)

    def put_back(self) -> None:
        """Makes withheld slots free again."""
        withheld, self._withheld = self._withheld, _NO_SLOTS
        self._push_free(withheld)

    def restore(self, keys: Sequence[BlockKey], slots: SlotIds) -> None:
        """Fills an unused pool with idle blocks, given in the order in which they are to be evicted."""
        assert self._num_free == self.num_slots, "only an unused pool can be restored"
        taken = np.zeros(self.num_slots, dtype=np.bool_)
        taken[slots] = True
        self._num_free = 0
        self._push_free(np.flatnonzero(~taken))
        self._index.update(zip(keys, slots.tolist(), strict=True))
        for key, slot in self._index.items():
            self._keys[slot] = key
        self._registered[slots] = True
        self._num_idle = len(slots)
        self._file(slots[::-1])

    def register(self, keys: Sequence[BlockKey], slots: SlotIds) -> Registration:
        """Makes used slots findable. Where a key is already registered, the caller's reference moves to that slot.

        Args:
            keys: distinct keys.
            slots: distinct slots, one for each key, on which the caller holds a reference each.
        """
        index, names = self._index, self._keys
        if index.keys().isdisjoint(keys):
            numbers = slots.tolist()
            index.update(zip(keys, numbers, strict=True))
            for key, slot in zip(keys, numbers, strict=True):
                names[slot] = key
            self._registered[slots] = True
            return Registration(slots, range(len(numbers)))
        canonical = slots.copy()
        new: list[int] = []
        for i, key in enumerate(keys):
            own = int(slots[i])
            known = index.get(key)
            if known is None:
                index[key] = own
                names[own] = key
                self._registered[own] = True
                new.append(i)
            else:
                canonical[i] = known
        moved = canonical != slots
        self.acquire(canonical[moved])
        self.release(slots[moved])
        return Registration(canonical, new)

    def forget(self, keys: Sequence[BlockKey]) -> tuple[list[BlockKey], SlotIds]:
        """Makes blocks unfindable, idle or not; slots in use become free when they are released.

        Returns:
            Those of `keys` that were registered, and their slots.
        """
        known = [key for key in keys if key in self._index]
        slots = np.array([self._index.pop(key) for key in known], dtype=np.int64)
        for slot in slots.tolist():
            self._keys[slot] = None
        self._registered[slots] = False
        idle = slots[self._stamp[slots] != 0]
        self._stamp[idle] = 0
        self._num_idle -= len(idle)
        self._push_free(idle)
        return known, slots

    def evict_idle(self) -> tuple[list[BlockKey], SlotIds]:
        """Evicts every block that nobody uses; returns their keys and the slots they lay in."""
        return self._evict(self._num_idle)

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: proportional to the number of slots."""
        free = self._free[: self._num_free]
        idle = np.flatnonzero(self._stamp)
        used = np.flatnonzero(self._refs)
        assert len(np.unique(free)) == self._num_free, "a slot is free twice"
        assert len(idle) == self._num_idle, f"{len(idle)} idle slots, {self._num_idle} counted"
        states = np.concatenate((free, idle, used, self._withheld))
        assert len(states) == self.num_slots, f"{len(states)} slots accounted for, {self.num_slots} exist"
        assert len(np.unique(states)) == self.num_slots, "a slot is in two states"
        assert (self._refs >= 0).all(), "a reference count is negative"
        assert self._registered[idle].all(), "an idle slot is not registered"
        assert not self._registered[free].any(), "a free slot is registered"
        assert len(self._index) == np.count_nonzero(self._registered), "index and registered slots differ in number"
        assert all(self._keys[slot] == key for key, slot in self._index.items()), "index and slot disagree on a key"
        live = [run[self._stamp[run] == number] for number, run in self._runs]
        filed = np.concatenate(live) if live else np.empty(0, dtype=np.int64)
        assert sorted(filed.tolist()) == idle.tolist(), "idle slots and filed slots differ"
        assert sum(len(run) for _, run in self._runs) == self._filed_slots, "filed places are miscounted"

    def _push_free(self, slots: SlotIds) -> None:
        top = self._num_free
        self._free[top : top + len(slots)] = slots[::-1]
        self._num_free = top + len(slots)

    def _file(self, slots: SlotIds) -> None:
        self._last_run += 1
        self._stamp[slots] = self._last_run
        self._runs.append((self._last_run, slots[::-1]))
        self._filed_slots += len(slots)
        if self._filed_slots > 4 * self.num_slots + 1024:
            self._drop_stale_places()

    def _drop_stale_places(self) -> None:
        runs = ((number, run[self._stamp[run] == number]) for number, run in self._runs)
        self._runs = deque((number, run) for number, run in runs if len(run))
        self._filed_slots = sum(len(run) for _, run in self._runs)

    def _evict(self, count: int) -> tuple[list[BlockKey], SlotIds]:
        keys: list[BlockKey] = []
        slots: list[SlotIds] = []
        while count > len(keys):
            number, run = self._runs.popleft()
            self._filed_slots -= len(run)
            live = run[self._stamp[run] == number]
            taken, rest = live[: count - len(keys)], live[count - len(keys) :]
            if len(rest):
                self._runs.appendleft((number, rest))
                self._filed_slots += len(rest)
            self._stamp[taken] = 0
            self._registered[taken] = False
            self._num_idle -= len(taken)
            self._push_free(taken)
            slots.append(taken)
            for slot in taken.tolist():
                key = self._keys[slot]
                assert key is not None, f"idle slot {slot} has no key"
                del self._index[key]
                self._keys[slot] = None
                keys.append(key)
        self.num_evicted += len(keys)
        return keys, np.concatenate(slots) if slots else _NO_SLOTS
