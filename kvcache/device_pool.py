"""Device slots, shared by sequences through reference counts."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo.kvcache.clearing import clear_pool
from dynamo.kvcache.errors import CacheClosedError, OutOfBlocksError
from dynamo.kvcache.events import EventLog, RunStarts
from dynamo.kvcache.eviction import EvictionOrder, Use
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.pool import BlockPlace, BlockPool
from dynamo.kvcache.removals import Removal
from dynamo.kvcache.stats import CacheCounters, TierUsage, tier_usage
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.tier import SlotIds

__all__ = ["DevicePool", "Reservation"]

_PIN_WAIT_S = 0.05  # how long an allocation waits for blocks that are only held by their own offload


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots a sequence holds from now on: blocks found, in chain order from the first, and blocks to be written."""

    matched: SlotIds
    fresh: SlotIds


class DevicePool:
    """The device tier's books and events. Thread-safe. Sequences hold its slots; offloads pin them while they copy.

    Attributes:
        tier: the storage. Not owned.
    """

    def __init__(
        self, tier: DeviceTier, events: EventLog, counters: CacheCounters, order: EvictionOrder | None = None
    ) -> None:
        self.tier = tier
        self._events = events
        self._counters = counters
        self._changed = threading.Condition()  # guards all below; notified whenever slots are given back
        self._pool = BlockPool(tier.num_slots, order)
        self._num_sequences = 0
        self._num_pins = 0
        self._num_held = 0
        self._is_closed = False

    @property
    def num_available(self) -> int:
        """Blocks that are free or hold only cached content that nobody uses."""
        return self._pool.num_available

    @property
    def num_sequences(self) -> int:
        """Reservations that have not been released."""
        return self._num_sequences

    def count_prefix(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first on, are here."""
        with self._changed:
            return self._pool.count_prefix(keys)

    def reserve(self, keys: Sequence[BlockKey], num_blocks: int, spare_blocks: int) -> Reservation:
        """Starts a sequence of `num_blocks`, the first of which may be shared if they are among `keys`.

        Raises:
            OutOfBlocksError: fewer than `spare_blocks` would be available afterwards; nothing was reserved.
            CacheClosedError: after `close`.
        """
        with self._changed:
            self.check_open()
            matched = self._pool.find_prefix(keys)
            self._pool.acquire(matched)
            try:
                fresh = self._allocate(num_blocks - len(matched), spare_blocks)
            except (OutOfBlocksError, CacheClosedError):
                self._pool.release(matched)
                raise
            self._num_sequences += 1
        if len(matched):
            self.tier.join()  # another stream may still be writing them
            self._counters.count_hits("device", len(matched))
        return Reservation(matched, fresh)

    def grow(self, num_blocks: int) -> SlotIds:
        """More slots for a sequence, in addition to its reservation.

        Raises:
            OutOfBlocksError: that many are not available; nothing was reserved.
            CacheClosedError: after `close`.
        """
        with self._changed:
            self.check_open()
            return self._allocate(num_blocks, 0)

    def share(self, keys: Sequence[BlockKey], slots: SlotIds, parent: BlockKey | None) -> SlotIds:
        """Makes a sequence's blocks findable, whose bytes are written and will not change.

        Args:
            keys: of the blocks in `slots`, which follow one another in a chain after `parent`.

        Returns:
            Where the sequence holds its blocks now: a block known before is shared, and the sequence's own slot freed.

        Raises:
            CacheClosedError: after `close`.
        """
        with self._changed:
            self.check_open()
            registered = self._pool.register(keys, slots, parent)
            if len(registered.new) == len(keys):
                self._events.stored("device", list(keys), parent)
            else:
                parents = [parent, *keys]
                self._events.stored_runs(
                    "device", [keys[i] for i in registered.new], [parents[i] for i in registered.new]
                )
                self._changed.notify_all()
            return registered.slots

    def pin(self, slots: SlotIds) -> None:
        """Holds a sequence's shared blocks, from its first one on, for an offload that may outlast the sequence.

        All of them and not the new ones alone: whichever of sequence and offload ends last then files the chain as one,
        leaves first.

        Raises:
            CacheClosedError: after `close`.
        """
        with self._changed:
            self.check_open()
            self._pool.acquire(slots)
            self._num_pins += 1

    def unpin(self, slots: SlotIds, use: Use | None = None) -> None:
        """Takes back what `pin` took, for `use`."""
        with self._changed:
            self._pool.release(slots, use)
            self._num_pins -= 1
            self._changed.notify_all()

    def hold(self, keys: Sequence[BlockKey]) -> SlotIds:
        """Pins what is here of `keys`, from the first on, until `let_go`. Nobody waits for such pins to end."""
        with self._changed:
            slots = self._pool.find_prefix(keys)
            self._pool.acquire(slots)
            self._num_held += len(slots)
            return slots

    def let_go(self, slots: SlotIds) -> None:
        """Takes back what `hold` took."""
        with self._changed:
            self._pool.release(slots)
            self._num_held -= len(slots)
            self._changed.notify_all()

    def release(self, slots: SlotIds, use: Use | None = None) -> None:
        """Ends a sequence that holds `slots`, given in chain order, for `use`."""
        self.tier.fences()  # marks this stream, whose queued kernels may still read the slots
        with self._changed:
            self._pool.release(slots, use)
            self._num_sequences -= 1
            self._changed.notify_all()

    def clear(self) -> None:
        """Drops every block that is not in use."""
        clear_pool(self._pool, self._changed, self._events, "device")

    def explain(self, key: BlockKey) -> BlockPlace | Removal | None:
        """Where a block lies, or why it does not; see `BlockPool.explain`."""
        with self._changed:
            return self._pool.explain(key)

    def runs(self) -> tuple[list[BlockKey], RunStarts]:
        """All blocks, and where their runs start, as in a `Snapshot`."""
        with self._changed:
            runs = self._pool.runs()
        return runs()

    def usage(self) -> TierUsage:
        """Occupancy and counters."""
        with self._changed:
            return tier_usage(self.tier.stats(), self._pool, self.tier.layout.slot_bytes, self._counters.hits("device"))

    def check_open(self) -> None:
        """Raises CacheClosedError after `close`."""
        if self._is_closed:
            raise CacheClosedError(
                "the cache is closed, and its open sequences with it; make another cache and open them there"
            )

    def close(self) -> None:
        """From now on slots are only taken back: whoever has a sequence open learns that the cache is gone. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance."""
        with self._changed:
            self._pool.check_invariants()
            if not self._num_sequences and not self._num_pins and not self._num_held:
                assert self._pool.num_pinned == 0, f"{self._pool.num_pinned} device blocks are held by nobody"

    def _allocate(self, count: int, spare: int) -> SlotIds:
        """The caller holds the lock, which is let go while offloads finish."""
        if count + spare > self._pool.num_available and self._num_pins:
            self._changed.wait_for(
                lambda: self._is_closed or count + spare <= self._pool.num_available or not self._num_pins,
                timeout=_PIN_WAIT_S,
            )
            self.check_open()
        room = self._pool.allocate(count) if count + spare <= self._pool.num_available else None
        if room is None:
            raise OutOfBlocksError(count + spare, self._pool.num_available)
        self._events.removed("device", room.evicted_keys)
        return room.slots
