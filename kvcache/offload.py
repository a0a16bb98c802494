"""Copies committed blocks down: device to host rows on one thread, host rows to disk on another.

    save ──► queue ──► offload thread: device ─► host rows, digests ──► host pool
                                                     │ rows stay pinned
                        bounded queue ◄──────────────┘
                            └──► disk thread: host rows ─► disk slots ─► journal ──► disk pool

A full queue holds `save` up for a bounded time; after that, and wherever a tier has no room, blocks are dropped and counted.
"""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dynamo.kernels.digest import digest_rows
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.pool import SlotIds
from dynamo.kvcache.shelf import ROOT_PARENT, Digests, Shelf, digest_seeds
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.disk import DiskTier

__all__ = ["Offloader", "SaveRequest"]

logger = logging.getLogger(__name__)

_ROOM_TIMEOUT_S = 10.0  # a block whose way down is barred for so long is dropped
_MAX_QUEUED_WRITES = 8  # parts; bounds the host rows that are pinned for the disk


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Blocks offered to the tiers below.

    Attributes:
        chain: keys of the whole sequence so far.
        first: position in `chain` of the first offered block; all from there on are offered.
        device_slots: where the offered blocks lie. Pinned until `release` is called.
        fence: point in a CUDA stream after which their bytes are written; None on CPU.
        release: gives the pins back. Called exactly once, on any thread.
    """

    chain: list[BlockKey]
    first: int
    device_slots: SlotIds
    fence: Fence | None
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _DiskWrite:
    keys: list[BlockKey]
    parents: list[BlockKey]
    rows: SlotIds
    digests: Digests


class Offloader:
    """Owns the offload and disk threads. Thread-safe."""

    def __init__(self, shelf: Shelf, device: DeviceTier, *, part_blocks: int, max_pending_blocks: int) -> None:
        """Starts the threads.

        Args:
            part_blocks: blocks copied at a time.
            max_pending_blocks: offered blocks, and so device pins, that may wait for the offload thread.
        """
        self._shelf = shelf
        self._device = device
        self._part_blocks = part_blocks
        self._max_pending_blocks = max_pending_blocks
        self._block_bytes = device.layout.block_bytes
        self._settled = threading.Condition()  # guards the counts; notified when one falls
        self._num_pending = 0
        self._num_writing = 0
        self._closing = False
        self._requests: queue.SimpleQueue[SaveRequest | list[BlockKey] | None] = queue.SimpleQueue()
        self._writes: queue.Queue[_DiskWrite | None] = queue.Queue(maxsize=_MAX_QUEUED_WRITES)
        self._threads = [threading.Thread(target=self._run, name="kv-offload", daemon=True)]
        if shelf.disk_tier:
            self._threads.append(
                threading.Thread(target=self._run_writes, args=(shelf.disk_tier,), name="kv-disk-write", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    @property
    def num_pending_blocks(self) -> int:
        """Offered blocks that still wait for the offload thread."""
        return self._num_pending

    @property
    def num_writing_blocks(self) -> int:
        """Blocks that lie in host rows and are on their way to disk."""
        return self._num_writing

    def save(self, request: SaveRequest, timeout_s: float) -> bool:
        """Offers blocks; waits while too many are pending, at most `timeout_s`, and then drops the offer.

        Returns:
            Whether the offer was taken. `request.release` is called in either case.
        """
        count = len(request.device_slots)
        with self._settled:
            taken = self._settled.wait_for(lambda: self._has_room(count), timeout_s) and not self._closing
            if taken:
                self._num_pending += count
        if taken:
            self._requests.put(request)
        else:
            self._shelf.counters.count_dropped("offload_queue_full", count)
            request.release()
        return taken

    def touch(self, chain: list[BlockKey]) -> None:
        """`Shelf.touch`, later and on the offload thread, to keep it off the caller's path."""
        self._requests.put(chain)

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything offered so far is in its tiers or dropped; False if that took longer than `timeout_s`."""
        with self._settled:
            return self._settled.wait_for(lambda: not self._num_pending and not self._num_writing, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Finishes what is pending, for at most `timeout_s`, and ends the threads."""
        with self._settled:
            self._closing = True
            self._settled.notify_all()
        self.flush(timeout_s)
        self._requests.put(None)
        self._threads[0].join()
        if len(self._threads) > 1:
            self._writes.put(None)
            self._threads[1].join()

    def _has_room(self, count: int) -> bool:
        return self._closing or not self._num_pending or self._num_pending + count <= self._max_pending_blocks

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            if not isinstance(request, SaveRequest):
                self._shelf.touch(request)
                continue
            try:
                self._offload(request)
            except Exception:
                logger.exception("offloading KV blocks failed; they stay in device memory only")
                self._shelf.counters.count_dropped("offload_error", len(request.device_slots))
            finally:
                request.release()
                with self._settled:
                    self._num_pending -= len(request.device_slots)
                    self._settled.notify_all()

    def _offload(self, request: SaveRequest) -> None:
        shelf = self._shelf
        offered = request.chain[request.first :]
        target, pools = (shelf.host, (shelf.host,)) if shelf.host.num_slots else (shelf.disk, (shelf.staging,))
        with shelf.changed:
            wanted = np.array([i for i, key in enumerate(offered) if key not in target], dtype=np.int64)
        while len(wanted):
            rows = shelf.take_rows(min(len(wanted), self._part_blocks), _ROOM_TIMEOUT_S, pools)
            if not len(rows):
                shelf.counters.count_dropped("no_host_row", len(wanted))
                break
            part, wanted = wanted[: len(rows)], wanted[len(rows) :]
            self._offload_part(request, part, rows)
        shelf.touch(request.chain)

    def _offload_part(self, request: SaveRequest, part: SlotIds, rows: SlotIds) -> None:
        shelf, chain = self._shelf, request.chain
        positions = (part + request.first).tolist()
        keys = [chain[position] for position in positions]
        parents = [chain[position - 1] if position else ROOT_PARENT for position in positions]
        try:
            done = self._device.read(request.device_slots[part], shelf.rows, rows, after=request.fence)
            if not done.all():
                shelf.counters.count_dropped("offload_error", len(keys))
                return
            digests = digest_rows(shelf.rows, rows, digest_seeds(keys), self._block_bytes)
            if shelf.host.num_slots:
                rows = shelf.keep_in_host(keys, rows, _or_none(parents[0]))
            if self._queue_write(_DiskWrite(keys, parents, rows, digests)):
                rows = rows[:0]  # the disk thread holds them now
        finally:
            shelf.release_rows(rows)

    def _queue_write(self, write: _DiskWrite) -> bool:
        shelf = self._shelf
        with shelf.changed:
            if shelf.disk_tier is None or all(key in shelf.disk for key in write.keys):
                return False
        with self._settled:
            self._num_writing += len(write.keys)
        try:
            self._writes.put(write, timeout=_ROOM_TIMEOUT_S)
        except queue.Full:
            shelf.counters.count_dropped("disk_queue_full", len(write.keys))
            self._settle_write(write)
            return False
        return True

    def _settle_write(self, write: _DiskWrite) -> None:
        with self._settled:
            self._num_writing -= len(write.keys)
            self._settled.notify_all()

    def _run_writes(self, disk: DiskTier) -> None:
        while (write := self._writes.get()) is not None:
            try:
                self._write(disk, write)
            except Exception:
                logger.exception("writing KV blocks to disk failed; they stay in the tiers above")
                self._shelf.counters.count_dropped("disk_write_failed", len(write.keys))
            finally:
                self._shelf.release_rows(write.rows)
                self._settle_write(write)

    def _write(self, disk: DiskTier, write: _DiskWrite) -> None:
        shelf, pool = self._shelf, self._shelf.disk
        shelf.notice_lost_disk()
        generation = disk.generation
        with shelf.changed:
            fresh = np.array([i for i, key in enumerate(write.keys) if key not in pool], dtype=np.int64)
            room = pool.allocate(min(len(fresh), pool.num_available))
            assert room is not None, "no more was asked for than there is"
            shelf.events.removed("disk", room.evicted_keys)
        shelf.counters.count_dropped("disk_slots_in_use", len(fresh) - len(room.slots))
        fresh, slots = fresh[: len(room.slots)], room.slots
        # Recorded before the slots are overwritten, so that a crash in between leaves no name for other bytes.
        shelf.record_drop(room.evicted_keys, room.evicted_slots)
        done = disk.write(slots, shelf.rows, write.rows[fresh])
        stored = fresh[done].tolist()
        keys = [write.keys[i] for i in stored]
        parents = [write.parents[i] for i in stored]
        digests = write.digests[fresh[done]]
        recorded = not keys or (disk.journal.put(keys, parents, slots[done], digests) and disk.generation == generation)
        with shelf.changed:
            if keys and recorded:
                shelf.disk_digests[slots[done]] = digests
                slots = np.concatenate((pool.register(keys, slots[done]), slots[~done]))
                shelf.events.stored("disk", keys, _or_none(parents[0]))
            pool.release(slots)
        shelf.counters.count_dropped("disk_write_failed", len(slots) - (len(keys) if recorded else 0))


def _or_none(parent: BlockKey) -> BlockKey | None:
    return None if parent == ROOT_PARENT else parent
