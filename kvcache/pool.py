"""Slots of one tier: which are free, which hold which block, who uses them, and which is given up next."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.block_index import BlockIndex
from dynamo.kvcache.entries import Entries
from dynamo.kvcache.events import RunStarts
from dynamo.kvcache.eviction import EvictionOrder, LeafFirstLRU, Use, anonymous_use
from dynamo.kvcache.free_slots import FreeSlots
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.lineage import NO_PARENT, Lineage, named_runs, slots_behind
from dynamo.kvcache.removals import MAX_REMOVALS, Removal, RemovalLog
from dynamo.kvcache.reuse import parts
from dynamo.kvcache.victims import choose_victims
from dynamo.tiers.tier import SlotIds

__all__ = ["Allocation", "BlockPlace", "BlockPool", "Registration"]

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


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """Where a block lies in a pool, and why it is kept.

    Attributes:
        num_users: who hold it now; it can be evicted only without any.
        num_children: registered blocks that continue it; they are evicted before it.
        is_orphan: the block before it is not registered.
        use: who used it last, and so with what it is ranked; None while somebody holds it.
    """

    slot: int
    num_users: int
    num_children: int
    is_orphan: bool
    use: Use | None


class BlockPool:
    """Reference counts, content index and eviction order of one tier's slots. Not thread-safe: its owner holds a lock.

    A slot is in one of four states:

        free ──allocate──► used, unregistered ──register──► used, registered ──release──► idle ──evict──► free
          ▲                      │ release                                ▲─────acquire─────┘
          └──────────────────────┘

    Only this class changes reference counts. `release` and `touch` take slots in chain order and file them as one *entry*
    of a use. Eviction takes blocks from the tail of the entry that the order puts first, but never one that others
    continue: an entry of which every block has descendants elsewhere is passed over until they are gone.

    Such a pass always ends with enough blocks, whatever the order, where every holder of a block holds all of it that
    comes before: an idle block's descendants are idle then, and among the idle blocks, finitely many without a ring, one
    has no descendants. Where a holder has not, since the beginning of the chain came after the rest, idle blocks may be
    left with none but held descendants; those go last, and make orphans of the descendants.
    """

    def __init__(self, num_slots: int, order: EvictionOrder | None = None) -> None:
        """Makes a pool of free slots.

        Args:
            order: which entry gives up blocks first; the pool's own from now on. None: the one used longest ago.
        """
        self.num_slots = num_slots
        self.num_evicted = 0
        self.removals = RemovalLog()
        self._free = FreeSlots(num_slots)
        self._refs = np.zeros(num_slots, dtype=np.int32)
        self._index = BlockIndex(num_slots)
        self._entries = Entries(num_slots, LeafFirstLRU() if order is None else order)
        self._lineage = Lineage(num_slots)

    def __len__(self) -> int:
        """Blocks that can be found by key."""
        return len(self._index.slots)

    def __contains__(self, key: object) -> bool:
        return key in self._index.slots

    @property
    def num_available(self) -> int:
        """Slots that `allocate` could give now: free and idle ones."""
        return self._free.count + self._entries.num_slots

    @property
    def num_free(self) -> int:
        """Slots that `allocate` could give without evicting anything."""
        return self._free.count

    @property
    def num_idle(self) -> int:
        """Registered blocks that nobody holds."""
        return self._entries.num_slots

    @property
    def num_pinned(self) -> int:
        """Slots somebody holds."""
        return self.num_slots - self.num_available - len(self._free.withheld) + self.num_leaving

    @property
    def num_leaving(self) -> int:
        """Slots that `resize` took away and that somebody still holds."""
        return int(np.count_nonzero(self._refs[self.num_slots :]))

    @property
    def num_orphans(self) -> int:
        """Registered blocks of which the block before is not."""
        return self._lineage.num_orphans

    @property
    def num_places(self) -> int:
        """Places in the order of eviction, stale ones included: what the order costs in memory."""
        return self._entries.num_places

    def find(self, key: BlockKey) -> int | None:
        """Slot of a registered block. The slot is not pinned."""
        return self._index.slots.get(key)

    @property
    def has(self) -> Callable[[BlockKey], bool]:
        """`in` as a function for many keys, good until the pool changes."""
        return self._index.has

    def count_prefix(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first on, are registered; takes half as long as to find them."""
        return self._index.count_prefix(keys)

    def find_prefix(self, keys: Sequence[BlockKey]) -> SlotIds:
        """Slots of the longest run of registered blocks from the first key on. They are not pinned."""
        return self._index.find_prefix(keys)

    def find_any(self, keys: Sequence[BlockKey]) -> SlotIds:
        """Slots of those of the distinct `keys` that are registered, in their order. They are not pinned."""
        slots = self._index.locate(keys)
        return slots[slots >= 0]

    def locate(self, keys: Sequence[BlockKey]) -> SlotIds:
        """Slot of each key; -1 where it is not registered. They are not pinned."""
        return self._index.locate(keys)

    def keys(self) -> list[BlockKey]:
        """All registered keys."""
        return list(self._index.slots)

    def runs(self) -> Callable[[], tuple[list[BlockKey], RunStarts]]:
        """A function that gives all registered keys in runs, and where these start, as in a `Snapshot`.

        It works on a copy, and may be called when the pool has changed, without its lock: it takes some time.
        """
        registered = np.flatnonzero(self._index.is_registered)
        return partial(
            named_runs, registered, self._index.copy_of_keys(), self._lineage.parents(), self._lineage.orphans()
        )

    def blocks_in(self, first: int, end: int, count: int) -> tuple[list[BlockKey], SlotIds]:
        """The first `count` registered blocks in slots [first, end): their keys, and the slots, ascending. Not pinned."""
        slots = np.flatnonzero(self._index.is_registered[first:end])[:count] + first
        return self._index.keys_of(slots), slots

    def explain(self, key: BlockKey) -> BlockPlace | Removal | None:
        """Where a block lies, or why it does not any more; None: not seen as far back as the memory of removals reaches."""
        slot = self._index.slots.get(key)
        if slot is None:
            return self.removals.find(key)
        number = self._entries.entry_of(slot)
        return BlockPlace(
            slot=slot,
            num_users=int(self._refs[slot]),
            num_children=self._lineage.num_children(slot),
            is_orphan=self._lineage.lacks(slot) is not None,
            use=self._entries.use(number) if number else None,
        )

    def acquire(self, slots: SlotIds) -> None:
        """Adds one reference to each of the distinct, registered or used `slots`."""
        if len(slots):
            self._entries.leave(slots)
            self._refs[slots] += 1

    def release(self, slots: SlotIds, use: Use | None = None) -> None:
        """Takes one reference from each of the distinct `slots`, given in chain order.

        A slot without references left becomes idle if it is registered, else free.

        Args:
            use: what the slots were held for, which are then a chain's from its first block on; None: an anonymous use now.
        """
        refs = self._refs[slots] - 1
        self._refs[slots] = refs
        registered = self._index.is_registered[slots]
        if not np.count_nonzero(refs) and np.count_nonzero(registered) == len(slots):
            for start, end, part in _parts(use, len(slots)):
                self._entries.file(slots[start:end], part)
            return
        is_unused = refs == 0
        self._free.push(slots[is_unused & ~registered])
        is_idle = is_unused & registered
        if is_idle.any():
            for start, end, part in _parts(use, len(slots)):
                piece = slots[start:end][is_idle[start:end]]
                if len(piece):
                    self._entries.file(piece, part)

    def touch(self, slots: SlotIds, use: Use | None = None) -> None:
        """Files the idle ones of the distinct `slots` anew, but for those that a later use filed.

        Args:
            slots: in chain order.
            use: as for `release`.
        """
        if self._entries.num_slots:
            for start, end, part in _parts(use, len(slots)):
                piece = self._entries.idle(slots[start:end])
                if len(piece):
                    self._entries.file_again(piece, part)

    def allocate(self, count: int) -> Allocation | None:
        """Takes `count` slots, each with one reference, evicting idle blocks as needed: all of them or, as None, none."""
        if count > self.num_available:
            return None
        candidates = self._entries.candidates(time.monotonic())
        evicted_keys, evicted_slots = self._evict(max(0, count - self._free.count), candidates, "evicted")
        slots = self._free.take(count)
        self._refs[slots] = 1
        return Allocation(slots, evicted_keys, evicted_slots)

    def slots_behind(self, first: int) -> Callable[[], SlotIds]:
        """What finds the slots from `first` on, and of the blocks that continue theirs, each before its parent.

        That takes a while for a large pool. It looks at the pool as it is now, so it needs no lock.
        """
        return partial(slots_behind, self._lineage.parents(), first)

    def withhold(self, first: int) -> None:
        """Takes the free ones of the slots from `first` on out of use, until `put_back`."""
        self._free.withhold(first)

    def put_back(self) -> None:
        """Makes withheld slots free again."""
        self._free.put_back()

    def resize(self, num_slots: int) -> tuple[list[BlockKey], SlotIds]:
        """Makes slots `[0, num_slots)` the pool's, while it is in use. Withheld slots are put back.

        Slots beyond are given to nobody any more. The blocks in them become unfindable, and so do those that continue
        them; slots still in use are gone when they are released: when `num_leaving` is 0.

        Returns:
            Keys of the blocks that became unfindable, and their slots.
        """
        self._free.put_back()
        self._free.limit(num_slots)
        old, self.num_slots = self.num_slots, num_slots
        added = num_slots - len(self._refs)
        if added > 0:
            self._refs = np.concatenate((self._refs, np.zeros(added, dtype=np.int32)))
            self._index.grow(num_slots)
            self._entries.grow(num_slots)
            self._lineage.grow(num_slots)
        if num_slots >= old:
            self._free.push(np.arange(old, num_slots)[self._refs[old:num_slots] == 0])
            return [], _NO_SLOTS
        going: SlotIds = np.flatnonzero(self._index.is_registered[num_slots:]) + num_slots
        while len(children := self._lineage.children(going)):
            going = np.concatenate((going, children))
        keys = self._index.keys_of(going)
        self._remove(keys, going, "resized")
        return keys, going

    def restore(
        self,
        names: npt.NDArray[np.void],
        slots: SlotIds,
        parents: SlotIds,
        ends: Sequence[int],
        lacking: Mapping[int, BlockKey] | None = None,
    ) -> None:
        """Fills an unused pool with idle blocks. Takes a third of a second for a million of them.

        Args:
            names: distinct keys, void16 [n], in the order in which blocks are to be evicted.
            slots: distinct, one for each name.
            parents: slots of the blocks before, NO_PARENT for none; no rings.
            ends: positions in `names` up to which blocks are filed as one entry each; the last is n.
            lacking: for slots of blocks whose parents are not among `names`, the parents' keys.
        """
        assert self._free.count == self.num_slots, "only an unused pool can be restored"
        self._index.restore(names, slots)
        self._free.clear()
        self._free.push(np.flatnonzero(~self._index.is_registered))
        self._lineage.restore(slots, parents)
        for slot, parent in (lacking or {}).items():
            self._lineage.add_orphan(slot, parent)
        use, start = anonymous_use(), 0
        for end in ends:
            self._entries.file(slots[start:end][::-1], use)
            start = end

    def register(
        self,
        keys: Sequence[BlockKey],
        slots: SlotIds,
        parent: BlockKey | None = None,
        *,
        parents: Sequence[BlockKey | None] | None = None,
    ) -> Registration:
        """Makes used slots findable. Where a key is already registered, the caller's reference moves to that slot.

        Args:
            keys: distinct keys.
            slots: distinct slots, one for each key, on which the caller holds a reference each. What lies in slots that
                `resize` took away cannot be found.
            parent: key of the block before the first, for keys that follow one another in a chain.
            parents: for keys that do not, the block before each.
        """
        index = self._index.slots
        if not len(slots):
            return Registration(slots, ())
        if self.num_slots < len(self._refs) and (slots >= self.num_slots).any():
            return self._register_within(keys, slots, [parent, *keys[:-1]] if parents is None else parents)
        if index.keys().isdisjoint(keys):
            self._index.add(keys, slots)
            registered = Registration(slots, range(len(slots)))
            if parents is None:
                self._lineage.append(slots, NO_PARENT if parent is None else index.get(parent, NO_PARENT))
                if parent is not None and parent not in index:
                    self._lineage.add_orphan(int(slots[0]), parent)
                self._lineage.adopt(keys, slots)
                return registered
        else:
            registered = self._register_unknown(keys, slots)
        if registered.new:
            self._add_to_lineage(keys, registered, [parent, *keys[:-1]] if parents is None else parents)
        return registered

    def forget(self, keys: Sequence[BlockKey]) -> tuple[list[BlockKey], SlotIds]:
        """Makes blocks unfindable, idle or not; slots in use become free when they are released.

        Blocks that continue them stay, and are orphans until their parents are registered again.

        Returns:
            Those of `keys` that were registered, and their slots.
        """
        index = self._index.slots
        known = [key for key in keys if key in index]
        slots = np.array([index[key] for key in known], dtype=np.int64)
        self._remove(known, slots, "lost")
        return known, slots

    def forget_slots(self, slots: SlotIds, reason: str) -> tuple[list[BlockKey], SlotIds]:
        """Makes the blocks unfindable that lie in some of the distinct `slots`; as `forget`."""
        slots = slots[self._index.is_registered[slots]]
        keys = self._index.keys_of(slots)
        self._remove(keys, slots, reason)
        return keys, slots

    def forget_all(self) -> Mapping[BlockKey, int]:
        """Makes all blocks unfindable, idle or not, in a few array operations.

        Returns:
            Which blocks there were, and in which slots. Let go of it without the lock: that takes longer than all else.
        """
        index = self._index.clear()
        idle = self._entries.all_idle()
        self._entries.clear()
        self._lineage.clear()
        self._free.push(idle)
        self.removals.add(list(islice(reversed(index), MAX_REMOVALS))[::-1], "lost")
        return index

    def evict_idle(self, count: int) -> tuple[list[BlockKey], SlotIds]:
        """Evicts up to `count` blocks that nobody uses, leaves first; returns their keys and the slots they lay in.

        Those that became idle first go first, whatever the order of eviction is.
        """
        return self._evict(min(count, self.num_idle), self._entries.numbers(), "cleared")

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance. Cost: proportional to the number of slots."""
        free, withheld = self._free.slots, self._free.withheld
        idle = self._entries.all_idle()
        used = np.flatnonzero(self._refs)
        registered = self._index.is_registered
        assert len(np.unique(free)) == len(free), "a slot is free twice"
        states = np.concatenate((free, idle, used[used < self.num_slots], withheld))
        assert len(states) == self.num_slots, f"{len(states)} slots accounted for, {self.num_slots} exist"
        assert len(np.unique(states)) == self.num_slots, "a slot is in two states"
        assert not len(states) or states.max() < self.num_slots, "a slot beyond the pool is in use"
        assert (self._refs >= 0).all(), "a reference count is negative"
        assert registered[idle].all(), "an idle slot is not registered"
        assert not registered[free].any(), "a free slot is registered"
        assert not registered[self.num_slots :].any(), "a slot beyond the pool is registered"
        self._index.check_invariants()
        self._entries.check_invariants()
        self._lineage.check_invariants(registered)
        for number in self._entries.barred:
            assert self._lineage.first_leaf(self._entries.slots(number)) is None, f"entry {number} has a leaf"

    def _register_within(
        self, keys: Sequence[BlockKey], slots: SlotIds, parents: Sequence[BlockKey | None]
    ) -> Registration:
        """`register` where some slots are the pool's no more: what lies there can only be given up for a known block."""
        places = np.flatnonzero(slots < self.num_slots)
        numbers = places.tolist()
        within = self.register([keys[i] for i in numbers], slots[places], parents=[parents[i] for i in numbers])
        canonical = slots.copy()
        canonical[places] = within.slots
        beyond = np.array(
            [i for i in np.flatnonzero(slots >= self.num_slots).tolist() if keys[i] in self._index.slots], np.int64
        )
        canonical[beyond] = [self._index.slots[keys[i]] for i in beyond.tolist()]
        self.acquire(canonical[beyond])
        self.release(slots[beyond])
        return Registration(canonical, [numbers[i] for i in within.new])

    def _register_unknown(self, keys: Sequence[BlockKey], slots: SlotIds) -> Registration:
        """`register` where some keys are known; leaves the lineage to the caller."""
        canonical, new = self._index.add_unknown(keys, slots)
        moved = canonical != slots
        self.acquire(canonical[moved])
        self.release(slots[moved])
        return Registration(canonical, new)

    def _add_to_lineage(
        self, keys: Sequence[BlockKey], registered: Registration, parents: Sequence[BlockKey | None]
    ) -> None:
        slots = registered.slots[list(registered.new)]
        wanted = [parents[i] for i in registered.new]
        index = self._index.slots
        found = [NO_PARENT if parent is None else index.get(parent, NO_PARENT) for parent in wanted]
        self._lineage.add(slots, np.array(found, dtype=np.int64))
        for slot, parent, place in zip(slots.tolist(), wanted, found, strict=True):
            if place == NO_PARENT and parent is not None:
                self._lineage.add_orphan(slot, parent)
        self._lineage.adopt([keys[i] for i in registered.new], slots)

    def _evict(self, count: int, candidates: Iterable[int], reason: str) -> tuple[list[BlockKey], SlotIds]:
        if not count:
            return [], _NO_SLOTS
        chosen, passed = choose_victims(self._entries, self._lineage, count, candidates)
        slots = chosen[0] if len(chosen) == 1 else np.concatenate([_NO_SLOTS, *chosen])
        keys = self._index.drop(slots)
        self._free.push(slots[::-1])  # a chain that lay in ascending slots leaves them for another in this order
        self.removals.add(keys, reason)
        if len(keys) < count:  # all that is left is held by those that hold what continues it, and not it
            left = np.concatenate([self._entries.slots(number) for number in passed])[: count - len(keys)]
            names = self._index.keys_of(left)
            self._remove(names, left, reason)
            keys, slots = keys + names, np.concatenate((slots, left))
        self.num_evicted += len(keys)
        return keys, slots

    def _remove(self, keys: list[BlockKey], slots: SlotIds, reason: str) -> None:
        """Makes blocks unfindable, wherever they stand, and those of their slots free that nobody uses."""
        for parent in self._lineage.remove(slots, keys).tolist():
            self._entries.unbar(parent)
        self._index.drop(slots)
        idle = self._entries.idle(slots)
        self._entries.leave(idle)
        self._free.push(idle)
        self.removals.add(keys, reason)


def _parts(use: Use | None, num_blocks: int) -> list[tuple[int, int, Use]]:
    """What to file of a chain of that length, as (first block, end, use): last part first, as leaves go first."""
    if use is None:
        return [(0, num_blocks, anonymous_use())] if num_blocks else []
    return list(parts(use, num_blocks))[::-1]
