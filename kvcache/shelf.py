"""What lies where below the device: the host and disk pools, the rows of the host arena, and one lock over all of it."""

import logging
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.pool import BlockPool
from dynamo.kvcache.stats import CacheCounters
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.host import HostTier
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.tier import Rows, SlotIds

__all__ = ["Digests", "Shelf", "digest_seeds"]

logger = logging.getLogger(__name__)

Digests = npt.NDArray[np.uint64]


class Shelf:
    """Index of the lower tiers. Thread-safe; owns no threads, and not the tiers.

    Attributes:
        changed: guards all pools and digests; notified whenever rows or slots are given back. Hold it to use the pools;
            all methods take it themselves.
        host: host tier's slots; slot i is row i of the arena.
        disk: disk tier's slots.
        staging: the arena's other rows, for bytes on their way between device and disk.
        disk_digests: of the block in each disk slot, uint64 [num_disk_slots].
        counters: the cache's.
    """

    def __init__(
        self, arena: HostTier, num_host_slots: int, disk: DiskTier | None, events: EventLog, counters: CacheCounters
    ) -> None:
        """Takes up where the disk tier's journal left off. `arena` has at least one row more than `num_host_slots`."""
        self.changed = threading.Condition()
        self.counters = counters
        self.host = BlockPool(num_host_slots)
        self.disk = BlockPool(disk.num_slots if disk else 0)
        self.staging = BlockPool(arena.num_slots - num_host_slots)
        self.disk_digests: Digests = np.zeros(self.disk.num_slots, dtype=np.uint64)
        self.events = events
        self._arena = arena
        self._disk_tier = disk
        self._generation = disk.generation if disk else 0
        if disk:
            self._recover(disk)

    @property
    def rows(self) -> Rows:
        """The arena, uint8 [num_rows, slot_bytes]."""
        return self._arena.rows

    def count_host_read(self, rows: SlotIds, seconds: float) -> None:
        """Counts blocks copied out of `rows`, if those are host slots."""
        if len(rows) and self.is_host_row(rows):
            self._arena.count_read(len(rows), seconds)

    def count_host_write(self, rows: SlotIds, seconds: float) -> None:
        """Counts blocks copied into `rows`, if those are host slots."""
        if len(rows) and self.is_host_row(rows):
            self._arena.count_write(len(rows), seconds)

    @property
    def disk_tier(self) -> DiskTier | None:
        """The disk tier, None without one."""
        return self._disk_tier

    def count_loadable(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first on, lie in host or disk."""
        with self.changed:
            for i, key in enumerate(keys):
                if key not in self.host and key not in self.disk:
                    return i
        return len(keys)

    def count_prefix(self, keys: Sequence[BlockKey]) -> tuple[int, int]:
        """How many of `keys`, from the first on, lie in host and in disk."""
        with self.changed:
            return len(self.host.find_prefix(keys)), len(self.disk.find_prefix(keys))

    def touch(self, chain: Sequence[BlockKey]) -> None:
        """Makes a sequence's blocks the last to be evicted, so that no tier drops a prefix before what follows it."""
        with self.changed:
            for pool in (self.host, self.disk):
                pool.touch(pool.find_any(chain))

    def take_rows(self, count: int, timeout_s: float, pools: tuple[BlockPool, ...]) -> SlotIds:
        """Up to `count` rows with one reference each, all from the first pool that has any; none after `timeout_s`."""
        with self.changed:
            self.changed.wait_for(lambda: any(pool.num_available for pool in pools), timeout_s)
            pool = next((pool for pool in pools if pool.num_available), pools[0])
            room = pool.allocate(min(count, pool.num_available))
            assert room is not None, "no more was asked for than there is"
            self.events.removed("host", room.evicted_keys)
            return room.slots if pool is self.host else room.slots + self.host.num_slots

    def release_rows(self, rows: SlotIds) -> None:
        """Gives one reference on each of `rows` back. All of them are host slots, or none is."""
        if not len(rows):
            return
        with self.changed:
            if self.is_host_row(rows):
                self.host.release(rows)
            else:
                self.staging.release(rows - self.host.num_slots)
            self.changed.notify_all()

    def is_host_row(self, rows: SlotIds) -> bool:
        """Whether `rows`, which are not empty, are slots of the host tier and not staging rows."""
        return bool(rows[0] < self.host.num_slots)

    def keep_in_host(self, keys: list[BlockKey], rows: SlotIds, parents: list[BlockKey | None]) -> SlotIds:
        """Registers host rows, whose bytes are right, under their keys.

        Returns:
            The rows on which the caller holds its references now; others than `rows` where a key was known already.
        """
        with self.changed:
            registered = self.host.register(keys, rows)
            self.events.stored_runs("host", [keys[i] for i in registered.new], [parents[i] for i in registered.new])
            self.changed.notify_all()
        return registered.slots

    def clear(self, tier: str) -> None:
        """Drops every block of "host" or "disk" that is not in use."""
        pool = self.host if tier == "host" else self.disk
        if not pool.num_slots:
            return
        with self.changed:
            removed, slots = pool.evict_idle()
            if len(pool):
                self.events.removed(tier, removed)
            else:
                self.events.cleared(tier)
        if tier == "disk":
            self.record_drop(removed, slots)

    def forget_on_disk(self, keys: list[BlockKey]) -> None:
        """Drops blocks whose bytes on disk are not what they were."""
        with self.changed:
            known, slots = self.disk.forget(keys)
            self.events.removed("disk", known)
        self.record_drop(known, slots)

    def record_drop(self, keys: list[BlockKey], slots: SlotIds) -> None:
        """Records in the journal that blocks are gone; not under the lock, since it writes to disk.

        If it fails, digests still keep other bytes from passing for them.
        """
        if keys and self._disk_tier:
            self._disk_tier.journal.drop(keys, slots)

    def notice_lost_disk(self) -> bool:
        """Forgets everything on disk if the disk file was lost since the last call. Returns whether it was."""
        if self._disk_tier is None:
            return False
        with self.changed:
            if self._disk_tier.generation == self._generation:
                return False
            self._generation = self._disk_tier.generation
            self.disk.forget(self.disk.keys())
            self.events.cleared("disk")
            return True

    def check_invariants(self) -> None:
        """Raises AssertionError if a pool's books do not balance."""
        with self.changed:
            for pool in (self.host, self.disk, self.staging):
                pool.check_invariants()

    def _recover(self, disk: DiskTier) -> None:
        """Fills the disk pool from the journal, in the order in which blocks are to be evicted: leaves before parents.

        A parent counts as used when its last child was recorded; children are always recorded after their parents.
        """
        recovered = disk.recovered
        last_use = {name: position for position, name in enumerate(recovered.names)}
        order: list[tuple[int, int]] = []
        for position in range(len(recovered.names) - 1, -1, -1):
            use = last_use[recovered.names[position]]
            order.append((use, -position))
            parent = recovered.parents[position]
            if last_use.get(parent, use) < use:
                last_use[parent] = use
        positions = np.array([-negated for _, negated in sorted(order)], dtype=np.int64)
        keys = [BlockKey(recovered.names[position]) for position in positions.tolist()]
        self.disk_digests[recovered.slots] = recovered.digests
        self.disk.restore(keys, recovered.slots[positions])
        parents = [BlockKey(parent) if parent != ROOT_NAME else None for parent in recovered.parents]
        self.events.stored_runs("disk", [BlockKey(name) for name in recovered.names], parents)


def digest_seeds(keys: Sequence[BlockKey]) -> Digests:
    """The keys' `lo` halves, uint64 [n]: digests seeded with them tell right bytes under a wrong name."""
    return np.frombuffer(b"".join(keys), dtype="<u8")[::2].astype(np.uint64)
