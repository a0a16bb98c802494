"""What lies where below the device: the host and disk pools, the rows of the host arena, and one lock over all of it."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

import numpy as np

from dynamo.kvcache.clearing import clear_pool, forget_behind
from dynamo.kvcache.events import EventLog, RunStarts
from dynamo.kvcache.eviction import OpenUse
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.load_decision import TierRun
from dynamo.kvcache.policies import Policies
from dynamo.kvcache.pool import Allocation, BlockPlace, BlockPool
from dynamo.kvcache.recovery import recover
from dynamo.kvcache.removals import Removal
from dynamo.kvcache.stats import CacheCounters
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.host import HostTier
from dynamo.tiers.slot_digests import DigestKind, DigestKinds, Digests
from dynamo.tiers.tier import Rows, SlotIds

__all__ = ["Hold", "Shelf", "digest_seeds"]

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.1  # how often a wait for rows asks whether it is futile
_FULL_DISK_PAUSE_S = 60.0  # how long a full disk is left at its size before the file is tried to grow again


@dataclass(slots=True)
class Hold:
    """Pins on what host and disk have of some chains. Made by `Shelf.hold`, ended by the last user's `Shelf.let_go`.

    Whole chains and not only the blocks that move: a leaf that was pinned while its prefix was not would outlive it, and
    nobody could find it.

    Attributes:
        host: host slots held, in chain order; its owner appends slots of which it has a reference.
        disk: disk slots held, likewise.
        uses: what the chains are held for, one for each; none at all where nobody knows.
    """

    chains: Sequence[Sequence[BlockKey]]
    host: SlotIds
    disk: SlotIds
    num_users: int = 1
    uses: Sequence[OpenUse | None] = ()


class Shelf:
    """Index of the lower tiers. Thread-safe; owns no threads, and not the tiers.

    Attributes:
        changed: guards all pools and digests; notified whenever rows or slots are given back. Hold it to use the pools;
            all methods take it themselves.
        host: host tier's slots; slot i is row i of the arena.
        disk: disk tier's slots.
        staging: the arena's other rows, for bytes on their way between device and disk.
        direct: rows of device memory for the same, where disk and device exchange bytes directly.
        disk_digests: of the block in each disk slot, uint64 [num_disk_slots].
        disk_digest_kinds: of what kind they are, uint8 [num_disk_slots].
        counters: the cache's.
    """

    def __init__(
        self,
        arena: HostTier,
        num_host_slots: int,
        disk: DiskTier | None,
        events: EventLog,
        counters: CacheCounters,
        policies: Policies | None = None,
        *,
        num_direct_rows: int = 0,
    ) -> None:
        """Takes up where the disk tier's journal left off. `arena` has at least `num_host_slots` slots and a staging row."""
        self.changed = threading.Condition()
        self.counters = counters
        self._policies = policies or Policies()
        self.host = BlockPool(num_host_slots, self._policies.new_order("host"))
        self.disk = BlockPool(disk.num_slots if disk else 0, self._policies.new_order("disk"))
        self._pools = {"host": self.host, "disk": self.disk}
        self.staging = BlockPool(arena.num_staging)
        self.direct = BlockPool(num_direct_rows)
        # Rows of all three are numbered in one, each pool's from here on.
        self._first_rows = {
            self.host: 0,
            self.staging: arena.max_slots,
            self.direct: arena.max_slots + arena.num_staging,
        }
        self.disk_digests: Digests = np.zeros(self.disk.num_slots, dtype=np.uint64)
        self.disk_digest_kinds: DigestKinds = np.zeros(self.disk.num_slots, dtype=np.uint8)
        self.events = events
        self._arena = arena
        self._disk_tier = disk
        self._generation = disk.generation if disk else 0
        self._withheld_until = math.inf
        if disk:
            self.disk_digests[disk.recovered.slots] = disk.recovered.digests
            self.disk_digest_kinds[disk.recovered.slots] = disk.recovered.digest_kinds
            recover(self.disk, disk.recovered)

    def pool(self, tier: str) -> BlockPool:
        """The slots of "host" or "disk"; see `changed` for when they may be used."""
        return self._pools[tier]

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

    def count_loadable(self, keys: Sequence[BlockKey], num_known: int = 0) -> int:
        """How many of `keys`, from the first on, lie in host or disk; the first `num_known` are not looked up."""
        with self.changed:
            in_host, in_disk = self.host.has, self.disk.has
            for i in range(num_known, len(keys)):
                if not in_disk(keys[i]) and not in_host(keys[i]):
                    return i
        return len(keys)

    def find_runs(self, keys: Sequence[BlockKey]) -> list[TierRun]:
        """Where `keys` lie, from the first on and as far as host or disk hold them; host where both do."""
        tiers = []
        with self.changed:
            in_host, in_disk = self.host.has, self.disk.has
            for key in keys:
                if in_host(key):
                    tiers.append("host")
                elif in_disk(key):
                    tiers.append("disk")
                else:
                    break
        return [TierRun(tier, len(list(run))) for tier, run in groupby(tiers)]

    def count_prefix(self, keys: Sequence[BlockKey]) -> tuple[int, int]:
        """How many of `keys`, from the first on, lie in host and in disk."""
        with self.changed:
            return self.host.count_prefix(keys), self.disk.count_prefix(keys)

    def touch(self, chain: Sequence[BlockKey], use: OpenUse | None = None) -> None:
        """Files a sequence's blocks under its use, or, without one, under a use now."""
        with self.changed:
            for pool in self._pools.values():
                pool.touch(pool.find_any(chain), use.latest if use else None)

    def admitted(self, tier: str, chain: Sequence[BlockKey], use: OpenUse | None) -> int:
        """How many leading blocks of a sequence's `chain` so far may lie in "host" or "disk", as the policy of admission says.

        Counts the others as dropped, once for each use. Called by one thread for each use.
        """
        admission = self._policies.admission
        if admission is None or use is None:
            return len(chain)
        pool = self.pool(tier)
        seen, end = use.admitted.get(tier, (0, 0)), len(chain)
        with self.changed:
            is_lacking = pool.locate(chain) < 0
            # What was admitted before is on its way: it is not asked for twice.
            first = max(seen[1], int(is_lacking.argmax()) if is_lacking.any() else end)
            if first < end:
                end = first + admission.admit(tier, chain, use.latest, end - first)
            refused = [chain[i] for i in range(max(end, seen[0]), len(chain)) if is_lacking[i]]
            pool.removals.add(refused, "not_admitted")
        use.admitted[tier] = (len(chain), end)
        self.counters.count_dropped("not_admitted", len(refused))
        return end

    def hold(self, chains: Sequence[Sequence[BlockKey]], uses: Sequence[OpenUse | None] = ()) -> "Hold":
        """Pins what host and disk have of `chains`, so that none of it is evicted while more of them is moved.

        Args:
            uses: what the chains are held for, one for each; none at all where nobody knows.
        """
        keys = chains[0] if len(chains) == 1 else list(dict.fromkeys(key for chain in chains for key in chain))
        with self.changed:
            hold = Hold(chains, self.host.find_any(keys), self.disk.find_any(keys), uses=uses)
            self.host.acquire(hold.host)
            self.disk.acquire(hold.disk)
        return hold

    def share(self, hold: "Hold") -> None:
        """Adds a user to a hold, who ends it with `let_go` like the first."""
        with self.changed:
            hold.num_users += 1

    def let_go(self, hold: "Hold") -> None:
        """Ends a user's part in a hold. After the last one, its blocks are the last to be evicted, leaves first."""
        with self.changed:
            hold.num_users -= 1
            if hold.num_users:
                return
            self.host.release(hold.host)
            self.disk.release(hold.disk)
            for chain, use in zip_longest(hold.chains, hold.uses):
                self.touch(chain, use)
            self.changed.notify_all()

    def take_rows(
        self, count: int, timeout_s: float, pools: tuple[BlockPool, ...], hold: "Hold", is_futile: Callable[[], bool]
    ) -> SlotIds:
        """Up to `count` rows with one reference each, all from the first pool that has any.

        Args:
            hold: what the new rows continue; if only that is in the way, there is nothing to wait for.
            is_futile: says, while waiting, that the rows are not wanted any more.

        Returns:
            No rows after `timeout_s`, when futile, or when only the held blocks are in the way.
        """
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while not any(pool.num_available for pool in pools):
                remaining_s = deadline - time.monotonic()
                num_others = sum(pool.num_pinned for pool in pools) - (len(hold.host) if self.host in pools else 0)
                if remaining_s <= 0 or num_others <= 0 or is_futile():
                    return hold.host[:0]
                self.changed.wait(min(remaining_s, _LOOK_AGAIN_S))
            pool = next(pool for pool in pools if pool.num_available)
            room = pool.allocate(min(count, pool.num_available))
            assert room is not None, "no more was asked for than there is"
            self.events.removed("host", room.evicted_keys)
            return room.slots + self._first_rows[pool]

    def take_disk_slots(self, count: int, hold: "Hold") -> Allocation:
        """Up to `count` disk slots with one reference each, evicting for them no block of the held chains they continue."""
        with self.changed:
            self._retry_withheld_slots()
            # A hold made earlier lacks what was written since.
            keys = dict.fromkeys(key for chain in hold.chains for key in chain)
            added = np.setdiff1d(self.disk.find_any(list(keys)), hold.disk)
            self.disk.acquire(added)
            hold.disk = np.concatenate((hold.disk, added))
            room = self.disk.allocate(min(count, self.disk.num_available))
            assert room is not None, "no more was asked for than there is"
            self.events.removed("disk", room.evicted_keys)
            return room

    def limit_disk(self) -> None:
        """After a refused write: makes do with the slots that the disk file has room for, for a while."""
        if self._disk_tier is not None:
            with self.changed:
                self.disk.withhold(self._disk_tier.num_allocated_slots)
                self._withheld_until = time.monotonic() + _FULL_DISK_PAUSE_S

    def _retry_withheld_slots(self) -> None:
        if time.monotonic() >= self._withheld_until:
            self.disk.put_back()
            self._withheld_until = math.inf

    def release_rows(self, rows: SlotIds) -> None:
        """Gives one reference on each of `rows`, which are of one pool, back."""
        if not len(rows):
            return
        with self.changed:
            pool = self.host if self.is_host_row(rows) else self.direct if self.is_direct_row(rows) else self.staging
            pool.release(rows - self._first_rows[pool])
            self.changed.notify_all()

    def is_host_row(self, rows: SlotIds) -> bool:
        """Whether `rows`, which are not empty, are slots of the host tier and not staging rows."""
        return bool(rows[0] < self._arena.max_slots)

    @property
    def first_direct_row(self) -> int:
        """Number of the first row that lies in device memory."""
        return self._first_rows[self.direct]

    def is_direct_row(self, rows: SlotIds) -> bool:
        """Whether `rows`, which are not empty, lie in device memory."""
        return bool(rows[0] >= self.first_direct_row)

    def wake(self) -> None:
        """Lets everybody who waits for rows look again whether they are still wanted."""
        with self.changed:
            self.changed.notify_all()

    def keep_in_host(self, keys: list[BlockKey], rows: SlotIds, parents: list[BlockKey | None]) -> SlotIds:
        """Registers host rows, whose bytes are right, under their keys.

        Returns:
            The rows on which the caller holds its references now; others than `rows` where a key was known already.
        """
        with self.changed:
            registered = self.host.register(keys, rows, parents=parents)
            self.events.stored_runs("host", [keys[i] for i in registered.new], [parents[i] for i in registered.new])
            self.changed.notify_all()
        return registered.slots

    def keep_on_disk(
        self,
        keys: list[BlockKey],
        slots: SlotIds,
        parents: list[BlockKey | None],
        digests: Digests,
        digest_kind: DigestKind,
    ) -> SlotIds:
        """Registers disk slots, written and recorded, under their keys; returns the slots now held, as `keep_in_host`."""
        with self.changed:
            self.disk_digests[slots] = digests
            self.disk_digest_kinds[slots] = digest_kind
            registered = self.disk.register(keys, slots, parents=parents)
            self.events.stored_runs("disk", [keys[i] for i in registered.new], [parents[i] for i in registered.new])
        return registered.slots

    def clear(self, tier: str) -> None:
        """Drops every block of "host" or "disk" that is not in use."""
        pool = self.pool(tier)
        if not pool.num_slots:
            return
        clear_pool(pool, self.changed, self.events, tier, self._recorder_of_drops(tier))

    def forget_on_disk(self, keys: list[BlockKey], slots: SlotIds) -> None:
        """Drops blocks whose bytes in `slots` are not what they were; not those that were written anew elsewhere."""
        with self.changed:
            still = [key for key, slot in zip(keys, slots.tolist(), strict=True) if self.disk.find(key) == slot]
            known, slots = self.disk.forget(still)
            self.events.removed("disk", known)
        self.record_drop(known, slots)

    def record_drop(self, keys: list[BlockKey], slots: SlotIds) -> None:
        """Records in the journal that blocks are gone; not under the lock, since it writes to disk.

        If it fails, digests still keep other bytes from passing for them.
        """
        if keys and self._disk_tier:
            self._disk_tier.journal.drop(keys, slots)

    def _recorder_of_drops(self, tier: str) -> Callable[[list[BlockKey], SlotIds], None] | None:
        """For the tier whose books outlive this process."""
        return self.record_drop if tier == "disk" else None

    def notice_lost_disk(self) -> bool:
        """Forgets everything on disk if the disk file was lost since the last call. Returns whether it was."""
        if self._disk_tier is None:
            return False
        with self.changed:
            if self._disk_tier.generation == self._generation:
                return False
            self._generation = self._disk_tier.generation
            lost = self.disk.forget_all()
            self.events.cleared("disk")
        logger.debug("%d KV blocks were lost with the disk file", len(lost))
        return True

    def explain(self, key: BlockKey) -> dict[str, BlockPlace | Removal | None]:
        """Where a block lies in host and disk, or why it does not; see `BlockPool.explain`."""
        with self.changed:
            return {name: pool.explain(key) for name, pool in self._pools.items() if pool.num_slots}

    def runs(self) -> dict[str, tuple[list[BlockKey], RunStarts]]:
        """All blocks in host and disk, and where their runs start, as in a `Snapshot`."""
        with self.changed:
            runs = {name: pool.runs() for name, pool in self._pools.items() if pool.num_slots}
        return {name: work_out() for name, work_out in runs.items()}

    def resize(self, tier: str, num_slots: int, timeout_s: float) -> bool:
        """Gives "host" or "disk" another number of slots, in the books alone, while they are in use.

        Blocks in slots that go, and those that continue them, are forgotten. The tier's storage must have the slots before
        the books are made larger, and keep them until this returns True.

        Returns:
            Whether nobody uses a slot beyond any more; False if that took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        pool, record_drop = self.pool(tier), self._recorder_of_drops(tier)
        if num_slots < pool.num_slots:
            forget_behind(pool, num_slots, self.changed, self.events, tier, record_drop)
        with self.changed:
            removed, slots = pool.resize(num_slots)  # what came meanwhile
            self.events.removed(tier, removed)
            if tier == "disk" and num_slots > len(self.disk_digests):
                num_added = num_slots - len(self.disk_digests)
                self.disk_digests = np.pad(self.disk_digests, (0, num_added))
                self.disk_digest_kinds = np.pad(self.disk_digest_kinds, (0, num_added))
            self.changed.notify_all()
        if record_drop:
            record_drop(removed, slots)
        with self.changed:
            return self.changed.wait_for(lambda: not pool.num_leaving, deadline - time.monotonic())

    def check_invariants(self) -> None:
        """Raises AssertionError if a pool's books do not balance."""
        with self.changed:
            for pool in (self.host, self.disk, self.staging, self.direct):
                pool.check_invariants()

    def check_unpinned(self, is_idle: Callable[[], bool]) -> None:
        """Raises AssertionError if slots are held although, before and after a look at them, nobody was at work."""
        for pool in (self.host, self.disk, self.staging, self.direct):
            if is_idle() and (num_pinned := pool.num_pinned) and is_idle():
                raise AssertionError(f"{num_pinned} slots below the device are held by nobody")


def digest_seeds(keys: Sequence[BlockKey]) -> Digests:
    """The keys' `lo` halves, uint64 [n]: digests seeded with them tell right bytes under a wrong name."""
    return np.frombuffer(b"".join(keys), dtype="<u8")[::2].astype(np.uint64)
