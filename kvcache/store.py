"""Content-addressed blocks of the tiers below the device: what lies where, and the threads that bring it there.

    commit ──► save queue ──► offload thread: device ─► host rows, digest ──► host pool
                                                              │ (rows stay pinned)
                              disk queue ◄────────────────────┘
                                  └──► disk thread: host rows ─► disk slots ─► journal ──► disk pool

    open ────► load ──► mover threads: host rows ─► device
                                       disk slots ─► host rows ─► digest checked ─► device, and kept in the host pool

The host arena is where all paths meet. Without a host tier it has staging rows only; with one, staging rows serve loads
when every host slot is pinned. Failure cases: a full queue or tier drops the offered block and counts it; a block that
cannot be read, or reads back with another digest, is forgotten, counted and computed again; a late one likewise.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.digest import digest_rows
from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.pool import BlockPool, SlotIds
from dynamo.kvcache.stats import StoreCounters
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.host import HostTier
from dynamo.tiers.mover import Mover, Transfer

__all__ = ["PART_BYTES", "BlockStore", "SaveRequest"]

logger = logging.getLogger(__name__)

PART_BYTES = 8 << 20  # one part of a transfer: large enough for the disk's full speed, small enough to overlap two hops
_NO_PARENT = bytes(16)
_NUM_LOAD_THREADS = 4
_ROW_TIMEOUT_S = 10.0  # a block whose way down is barred for so long is dropped


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Blocks offered to the tiers below.

    Attributes:
        chain: keys of the whole sequence so far.
        first: position in `chain` of the first offered block; all from there on are offered.
        device_slots: where the offered blocks lie. Pinned until `release` is called.
        fence: event after which their bytes are written; None on CPU.
        release: gives the pins back. Called exactly once, on another thread.
    """

    chain: list[BlockKey]
    first: int
    device_slots: SlotIds
    fence: torch.cuda.Event | None
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _DiskWrite:
    keys: list[BlockKey]
    parents: list[BlockKey]
    rows: SlotIds
    digests: npt.NDArray[np.uint64]


class BlockStore:
    """Host and disk tiers behind one index. All methods are thread-safe.

    Owns the tiers given to it and its threads; `close` ends them.
    """

    def __init__(
        self,
        device: DeviceTier,
        arena: HostTier,
        num_host_slots: int,
        disk: DiskTier | None,
        events: EventLog,
        *,
        max_pending_blocks: int,
    ) -> None:
        """Starts the threads.

        Args:
            arena: rows `[0, num_host_slots)` are the host tier, the others staging rows, of which there is at least one.
            max_pending_blocks: offered blocks, and so device pins, that may wait for the offload thread.
        """
        self.counters = StoreCounters()
        self.host = BlockPool(num_host_slots)
        self.disk = BlockPool(disk.num_slots if disk else 0)
        self._device = device
        self._arena = arena
        self._disk_tier = disk
        self._events = events
        self._layout = device.layout
        self._staging = BlockPool(arena.num_slots - num_host_slots)
        self._host_digests = np.zeros(arena.num_slots, dtype=np.uint64)
        self._disk_digests = np.zeros(self.disk.num_slots, dtype=np.uint64)
        self._disk_generation = disk.generation if disk else 0
        self._part_blocks = max(1, PART_BYTES // self._layout.slot_bytes)
        self._max_pending_blocks = max_pending_blocks
        self._pending_blocks = 0
        self._pending_writes = 0
        self._changed = threading.Condition()  # guards pools, digests and pending counts; told of every release
        self._closing = False
        self._corruption_logged = False
        self._saves: queue.SimpleQueue[SaveRequest | list[BlockKey] | None] = queue.SimpleQueue()
        self._disk_writes: queue.Queue[_DiskWrite | None] = queue.Queue(maxsize=8)
        if disk:
            self._recover(disk)
        self._mover = Mover(_NUM_LOAD_THREADS)
        self._threads = [threading.Thread(target=self._run_saves, name="kv-offload", daemon=True)]
        if disk:
            self._threads.append(threading.Thread(target=self._run_disk_writes, name="kv-disk-write", daemon=True))
        for thread in self._threads:
            thread.start()

    def count_loadable(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first on, lie in host or disk."""
        with self._changed:
            for i, key in enumerate(keys):
                if key not in self.host and key not in self.disk:
                    return i
        return len(keys)

    def count_prefix(self, keys: Sequence[BlockKey]) -> tuple[int, int]:
        """How many of `keys`, from the first on, lie in host and in disk."""
        with self._changed:
            return len(self.host.find_prefix(keys)), len(self.disk.find_prefix(keys))

    def load(self, keys: Sequence[BlockKey], device_slots: SlotIds, timeout_s: float) -> Transfer:
        """Starts loading blocks into device slots that the caller holds until the transfer has ended."""
        transfer = Transfer(len(keys), timeout_s)
        from_host: list[tuple[int, int]] = []
        from_disk: list[tuple[int, int]] = []
        with self._changed:
            for position, key in enumerate(keys):
                if (slot := self.host.find(key)) is not None:
                    from_host.append((position, slot))
                elif (slot := self.disk.find(key)) is not None:
                    from_disk.append((position, slot))
                else:
                    self.counters.count_fault("missing", len(keys) - position)
                    break
            self.host.acquire(np.array([slot for _, slot in from_host], dtype=np.int64))
            self.disk.acquire(np.array([slot for _, slot in from_disk], dtype=np.int64))
        parts: list[Callable[[], None]] = []
        for places, load in ((from_host, self._load_from_host), (from_disk, self._load_from_disk)):
            for start in range(0, len(places), self._part_blocks):
                positions, slots = np.array(places[start : start + self._part_blocks], dtype=np.int64).T.copy()
                part_keys = [keys[position] for position in positions.tolist()]
                parts.append(partial(load, transfer, part_keys, positions, slots, device_slots[positions]))
        self._mover.submit(transfer, parts)
        return transfer

    def save(self, request: SaveRequest, timeout_s: float) -> bool:
        """Offers blocks; waits while too many are pending, at most `timeout_s`, and then drops the offer.

        Returns:
            Whether the offer was taken. `request.release` is called in either case.
        """
        count = len(request.device_slots)
        with self._changed:
            taken = self._changed.wait_for(
                lambda: (
                    self._closing
                    or not self._pending_blocks
                    or self._pending_blocks + count <= self._max_pending_blocks
                ),
                timeout_s,
            )
            taken = taken and not self._closing
            if taken:
                self._pending_blocks += count
            else:
                self.counters.count_dropped("offload_queue_full", count)
        if taken:
            self._saves.put(request)
        else:
            request.release()
        return taken

    def touch(self, chain: list[BlockKey]) -> None:
        """Says that a sequence uses these blocks, so that no tier evicts a prefix before what follows it."""
        self._saves.put(chain)

    @property
    def num_pending_blocks(self) -> int:
        """Offered blocks that still wait for the offload thread."""
        return self._pending_blocks

    @property
    def num_pending_disk_writes(self) -> int:
        """Blocks that lie in host rows and are on their way to disk."""
        return self._pending_writes

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything offered so far is in its tiers or dropped; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending_blocks and not self._pending_writes, timeout_s)

    def clear(self, tier: str) -> None:
        """Drops every block of "host" or "disk" that is not in use at this moment."""
        pool = self.host if tier == "host" else self.disk
        with self._changed:
            removed, slots = pool.evict_idle()
            if tier == "disk":
                self._journal_drop(removed, slots)
            if len(pool):
                self._events.removed(tier, removed)
            else:
                self._events.cleared(tier)

    def check_invariants(self) -> None:
        """Raises AssertionError if a pool's books do not balance."""
        with self._changed:
            self.host.check_invariants()
            self.disk.check_invariants()
            self._staging.check_invariants()
            assert self._pending_blocks >= 0, "pending offers are miscounted"
            assert self._pending_writes >= 0, "pending disk writes are miscounted"

    def close(self, timeout_s: float) -> None:
        """Writes what is pending, for at most `timeout_s`, then ends threads and tiers. Idempotent."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self.flush(timeout_s)
        self._saves.put(None)
        self._threads[0].join()
        if self._disk_tier:
            self._disk_writes.put(None)
            self._threads[1].join()
        self._mover.close()
        if self._disk_tier:
            self._disk_tier.close()
        self._arena.close()

    # Offload: one thread takes blocks from the device to host rows, another from there to disk.

    def _run_saves(self) -> None:
        while (request := self._saves.get()) is not None:
            try:
                if isinstance(request, SaveRequest):
                    self._offload(request)
                else:
                    self._touch(request)
            except Exception:
                logger.exception("offloading KV blocks failed; they stay in device memory only")
                self.counters.count_fault("offload_error", 1)
            finally:
                if isinstance(request, SaveRequest):
                    request.release()
                    with self._changed:
                        self._pending_blocks -= len(request.device_slots)
                        self._changed.notify_all()

    def _touch(self, chain: list[BlockKey]) -> None:
        with self._changed:
            for pool in (self.host, self.disk):
                pool.touch(pool.find_any(chain))

    def _offload(self, request: SaveRequest) -> None:
        offered = request.chain[request.first :]
        target = self.host if self.host.num_slots else self.disk
        pools = (self.host,) if self.host.num_slots else (self._staging,)
        with self._changed:
            wanted = np.array([i for i, key in enumerate(offered) if key not in target], dtype=np.int64)
        while len(wanted):
            rows = self._take_rows(min(len(wanted), self._part_blocks), _ROW_TIMEOUT_S, pools)
            if not len(rows):
                self.counters.count_dropped("no_host_row", len(wanted))
                return
            part, wanted = wanted[: len(rows)], wanted[len(rows) :]
            self._offload_part(request, part, rows)
        self._touch(request.chain)

    def _offload_part(self, request: SaveRequest, part: SlotIds, rows: SlotIds) -> None:
        first = request.first
        keys = [request.chain[first + i] for i in part.tolist()]
        parents = [request.chain[first + i - 1] if first + i else BlockKey(_NO_PARENT) for i in part.tolist()]
        done = self._device.read(request.device_slots[part], self._arena.rows, rows, after=request.fence)
        if not done.all():
            self.counters.count_fault("offload_error", int(np.count_nonzero(~done)))
            self._release_rows(rows)
            return
        digests = digest_rows(self._arena.rows, rows, _seeds(keys), self._layout.block_bytes)
        with self._changed:
            if self.host.num_slots:
                self._host_digests[rows] = digests
                rows = self.host.register(keys, rows)
                self._changed.notify_all()
                self._events.stored("host", keys, parents[0] if parents[0] != _NO_PARENT else None)
            if self._disk_tier is None or all(key in self.disk for key in keys):
                self._release_rows(rows)
                return
            self._pending_writes += len(keys)
        try:
            self._disk_writes.put(_DiskWrite(keys, parents, rows, digests), timeout=_ROW_TIMEOUT_S)
        except queue.Full:
            self._finish_write(rows)
            self.counters.count_dropped("disk_queue_full", len(keys))

    def _run_disk_writes(self) -> None:
        while (write := self._disk_writes.get()) is not None:
            try:
                self._write_to_disk(write)
            except Exception:
                logger.exception("writing KV blocks to disk failed; they stay in the tiers above")
                self.counters.count_fault("offload_error", len(write.keys))
            finally:
                self._finish_write(write.rows)

    def _write_to_disk(self, write: _DiskWrite) -> None:
        assert self._disk_tier is not None, "the disk thread runs only with a disk tier"
        self._notice_new_generation()
        with self._changed:
            fresh = np.array([i for i, key in enumerate(write.keys) if key not in self.disk], dtype=np.int64)
            room = self.disk.allocate(min(len(fresh), self.disk.num_available))
            assert room is not None, "no more was asked for than there is"
            self._events.removed("disk", room.evicted_keys)
        self.counters.count_dropped("disk_slots_in_use", len(fresh) - len(room.slots))
        fresh, slots = fresh[: len(room.slots)], room.slots
        # Recorded before the slots are overwritten, so that a crash in between leaves no name for other bytes.
        self._journal_drop(room.evicted_keys, room.evicted_slots)
        done = self._disk_tier.write(slots, self._arena.rows, write.rows[fresh])
        stored = fresh[done].tolist()
        keys = [write.keys[i] for i in stored]
        parents = [write.parents[i] for i in stored]
        digests = write.digests[fresh[done]]
        recorded = not keys or self._disk_tier.journal.put(keys, parents, slots[done], digests)
        with self._changed:
            if keys and recorded and self._disk_tier.generation == self._disk_generation:
                self._disk_digests[slots[done]] = digests
                slots = np.concatenate((self.disk.register(keys, slots[done]), slots[~done]))
                self._events.stored("disk", keys, _parent_event(parents[0]))
            self.disk.release(slots)
        self.counters.count_dropped("disk_write_failed", len(slots) - (len(keys) if recorded else 0))

    def _finish_write(self, rows: SlotIds) -> None:
        with self._changed:
            self._pending_writes -= len(rows)
            self._release_rows(rows)

    # Onboarding: parts of transfers, on the mover's threads.

    def _load_from_host(
        self, transfer: Transfer, keys: list[BlockKey], positions: SlotIds, rows: SlotIds, device_slots: SlotIds
    ) -> None:
        try:
            if transfer.deliver(positions, lambda: self._device.write(device_slots, self._arena.rows, rows)):
                self.counters.count_loaded("host", len(keys))
        finally:
            self._release_rows(rows)

    def _load_from_disk(
        self, transfer: Transfer, keys: list[BlockKey], positions: SlotIds, slots: SlotIds, device_slots: SlotIds
    ) -> None:
        start = 0
        try:
            while start < len(keys) and not transfer.is_ended:
                rows = self._take_rows(len(keys) - start, transfer.remaining_s, (self.host, self._staging))
                if not len(rows):
                    break
                part = slice(start, start + len(rows))
                self._load_part_from_disk(transfer, keys[part], positions[part], slots[part], device_slots[part], rows)
                start += len(rows)
        finally:
            with self._changed:
                self.disk.release(slots)

    def _load_part_from_disk(
        self,
        transfer: Transfer,
        keys: list[BlockKey],
        positions: SlotIds,
        slots: SlotIds,
        device_slots: SlotIds,
        rows: SlotIds,
    ) -> None:
        assert self._disk_tier is not None, "blocks are on disk only with a disk tier"
        try:
            readable = self._disk_tier.read(slots, self._arena.rows, rows)
            good = readable.copy()
            digests = digest_rows(self._arena.rows, rows[readable], _seeds_at(keys, readable), self._layout.block_bytes)
            good[readable] = digests == self._disk_digests[slots[readable]]
            self._forget_bad(keys, readable, good)
            good_rows = rows[good]
            if transfer.deliver(
                positions[good], lambda: self._device.write(device_slots[good], self._arena.rows, good_rows)
            ):
                self.counters.count_loaded("disk", len(good_rows))
            rows = self._promote([key for key, ok in zip(keys, good.tolist(), strict=True) if ok], rows, good, slots)
        finally:
            self._release_rows(rows)

    def _promote(self, keys: list[BlockKey], rows: SlotIds, good: npt.NDArray[np.bool_], slots: SlotIds) -> SlotIds:
        """Registers verified rows in the host pool if they are its own; returns the rows whose pins are held now."""
        if not keys or rows[0] >= self.host.num_slots:
            return rows
        with self._changed:
            self._host_digests[rows[good]] = self._disk_digests[slots[good]]
            known = len(self.host)
            rows = rows.copy()
            rows[good] = self.host.register(keys, rows[good])
            if len(self.host) > known:
                self._events.stored("host", keys, None)
            self._changed.notify_all()
        return rows

    def _forget_bad(self, keys: list[BlockKey], readable: npt.NDArray[np.bool_], good: npt.NDArray[np.bool_]) -> None:
        if good.all():
            return
        num_corrupt = int(np.count_nonzero(readable & ~good))
        if self._notice_new_generation():
            return
        with self._changed:
            bad, slots = self.disk.forget([key for key, ok in zip(keys, good.tolist(), strict=True) if not ok])
            self._events.removed("disk", bad)
            self._journal_drop(bad, slots)
            log = num_corrupt > 0 and not self._corruption_logged
            self._corruption_logged |= log
        self.counters.count_fault("corrupt", num_corrupt)
        self.counters.count_fault("unreadable", int(np.count_nonzero(~readable)))
        if log:
            logger.warning(
                "%d KV blocks read from disk do not match their digests and are computed again; further ones are only counted",
                num_corrupt,
            )

    # Rows of the arena: host slots first, staging rows when those are all pinned or when there is no host tier.

    def _take_rows(self, count: int, timeout_s: float, pools: tuple[BlockPool, ...]) -> SlotIds:
        """Up to `count` rows with one reference each, all from the first pool that has any; none after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: any(pool.num_available for pool in pools), timeout_s)
            pool = next((pool for pool in pools if pool.num_available), pools[0])
            room = pool.allocate(min(count, pool.num_available))
            assert room is not None, "no more was asked for than there is"
            self._events.removed("host", room.evicted_keys)
            return room.slots if pool is self.host else room.slots + self.host.num_slots

    def _release_rows(self, rows: SlotIds) -> None:
        if not len(rows):
            return
        with self._changed:
            if rows[0] < self.host.num_slots:
                self.host.release(rows)
            else:
                self._staging.release(rows - self.host.num_slots)
            self._changed.notify_all()

    # The disk tier's memory: its journal, and the generation that ends when its file is lost.

    def _recover(self, disk: DiskTier) -> None:
        """Fills the disk pool from the journal, in the order in which blocks are to be evicted: leaves before parents."""
        recovered = disk.recovered
        keys = [BlockKey(name) for name in recovered.names]
        last_use = dict(zip(recovered.names, range(len(keys)), strict=True))
        depth_first: list[tuple[int, int]] = []
        for position in range(len(keys) - 1, -1, -1):  # children are recorded after their parents
            use = last_use[recovered.names[position]]
            depth_first.append((use, -position))
            parent = recovered.parents[position]
            if last_use.get(parent, use) < use:
                last_use[parent] = use
        order = np.array([-negated for _, negated in sorted(depth_first)], dtype=np.int64)
        self._disk_digests[recovered.slots] = recovered.digests
        self.disk.restore([keys[i] for i in order.tolist()], recovered.slots[order])
        self._events.stored("disk", keys, None)

    def _notice_new_generation(self) -> bool:
        """Forgets all blocks of a disk file that was lost. Returns whether it was."""
        assert self._disk_tier is not None, "only a disk tier has generations"
        generation = self._disk_tier.generation
        with self._changed:
            if generation == self._disk_generation:
                return False
            self._disk_generation = generation
            self.disk.forget(self.disk.keys())
            self._events.cleared("disk")
            return True

    def _journal_drop(self, keys: list[BlockKey], slots: SlotIds) -> None:
        """Records that blocks are gone. If that fails, their digests still keep other bytes from passing for them."""
        if keys and self._disk_tier:
            self._disk_tier.journal.drop(keys, slots)


def _seeds(keys: Sequence[BlockKey]) -> npt.NDArray[np.uint64]:
    """The keys' `lo` halves: digests seeded with them tell right bytes under a wrong name."""
    return np.frombuffer(b"".join(keys), dtype="<u8")[::2].astype(np.uint64)


def _seeds_at(keys: list[BlockKey], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    return _seeds(keys)[mask] if keys else np.empty(0, dtype=np.uint64)


def _parent_event(parent: BlockKey) -> BlockKey | None:
    return None if parent == _NO_PARENT else parent
