"""Copies committed blocks down: device to host rows on one thread, host rows to disk on another.

    save ──► queue ──► offload thread: device ─► host rows, digests ──► host pool
                                                     │ rows stay pinned
                        bounded queue ◄──────────────┘
                            └──► disk thread: host rows ─► disk slots ─► journal ──► disk pool

Requests that queue up are copied together, since a decoding sequence commits one block at a time. A full queue holds `save`
up for a bounded time, once; from then until the queue is half empty, and wherever a tier has no room, blocks are dropped and
counted.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dynamo.kernels.digest import digest_rows
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.shelf import Digests, Shelf, digest_seeds
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.tier import SlotIds

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


class _Touch:
    """In the queue: chains wait to be touched."""


_TOUCH = _Touch()


@dataclass(frozen=True, slots=True)
class _Offer:
    """Blocks of one or several requests, not yet in the tier below; distinct keys, parents before children."""

    keys: list[BlockKey]
    parents: list[BlockKey | None]
    device_slots: SlotIds
    fences: list[Fence]


@dataclass(frozen=True, slots=True)
class _DiskWrite:
    keys: list[BlockKey]
    parents: list[BlockKey | None]
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
        self._congested = False
        self._requests: queue.SimpleQueue[SaveRequest | _Touch | None] = queue.SimpleQueue()
        self._touches: dict[BlockKey, list[BlockKey]] = {}  # the longest chain of those that start with the same block
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

        After a drop, offers are not waited for until the queue has drained to half: a tier that is too slow holds its
        callers up once, not with every block.

        Returns:
            Whether the offer was taken. `request.release` is called in either case.
        """
        count = len(request.device_slots)
        with self._settled:
            if self._congested and 2 * self._num_pending <= self._max_pending_blocks:
                self._congested = False
            wait_s = 0.0 if self._congested else timeout_s
            taken = self._settled.wait_for(lambda: self._has_room(count), wait_s) and not self._closing
            if taken:
                self._num_pending += count
            else:
                self._congested = True
        if taken:
            self._requests.put(request)
        else:
            self._shelf.counters.count_dropped("closing" if self._closing else "offload_queue_full", count)
            request.release()
        return taken

    def touch(self, chain: list[BlockKey]) -> None:
        """`Shelf.touch`, later and on the offload thread, to keep it off the caller's path."""
        with self._settled:
            is_first = not self._touches
            if len(chain) > len(self._touches.get(chain[0], ())):
                self._touches[chain[0]] = chain
        if is_first:
            self._requests.put(_TOUCH)

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything offered so far is in its tiers or dropped; False if that took longer than `timeout_s`."""
        with self._settled:
            return self._settled.wait_for(lambda: not self._num_pending and not self._num_writing, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Finishes what is pending and ends the threads, all within `timeout_s`; a thread that hangs is left behind."""
        deadline = time.monotonic() + timeout_s
        with self._settled:
            self._closing = True
            self._settled.notify_all()
        self.flush(timeout_s)
        self._requests.put(None)
        self._threads[0].join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(queue.Full):  # the disk thread hangs, or it would have made room
            self._writes.put(None, timeout=max(0.0, deadline - time.monotonic()))
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            logger.error(
                "offloading KV blocks still runs %g s after it was told to end; going on without it", timeout_s
            )

    def _has_room(self, count: int) -> bool:
        return self._closing or not self._num_pending or self._num_pending + count <= self._max_pending_blocks

    def _run(self) -> None:
        is_open = True
        while is_open:
            requests: list[SaveRequest] = []
            is_open = self._collect(requests)
            try:
                self._offload(self._merge(requests))
                self._touch(requests)
            except Exception:
                logger.exception("offloading KV blocks failed; they stay in device memory only")
                self._shelf.counters.count_dropped("offload_error", sum(len(r.device_slots) for r in requests))
            finally:
                for request in requests:
                    request.release()
                with self._settled:
                    self._num_pending -= sum(len(request.device_slots) for request in requests)
                    self._settled.notify_all()

    def _collect(self, requests: list[SaveRequest]) -> bool:
        """Waits for a request, and takes what has queued behind it up to about one part. False at the end of the queue."""
        num_blocks = 0
        request = self._requests.get()
        while request is not None:
            if isinstance(request, SaveRequest):
                requests.append(request)
                num_blocks += len(request.device_slots)
            if num_blocks >= self._part_blocks or self._requests.empty():
                return True
            request = self._requests.get()
        return False

    def _touch(self, requests: list[SaveRequest]) -> None:
        with self._settled:
            chains, self._touches = self._touches, {}
        for request in requests:
            if len(request.chain) > len(chains.get(request.chain[0], ())):
                chains[request.chain[0]] = request.chain
        for chain in chains.values():
            self._shelf.touch(chain)

    def _merge(self, requests: list[SaveRequest]) -> _Offer:
        shelf = self._shelf
        target = shelf.host if shelf.host.num_slots else shelf.disk
        places: dict[BlockKey, tuple[BlockKey | None, int]] = {}
        with shelf.changed:
            for request in requests:
                for position, slot in enumerate(request.device_slots.tolist(), request.first):
                    key = request.chain[position]
                    if key not in target:
                        places[key] = (request.chain[position - 1] if position else None, slot)
        return _Offer(
            list(places),
            [parent for parent, _ in places.values()],
            np.array([slot for _, slot in places.values()], dtype=np.int64),
            [request.fence for request in requests if request.fence is not None],
        )

    def _offload(self, offer: _Offer) -> None:
        shelf = self._shelf
        pools = (shelf.host,) if shelf.host.num_slots else (shelf.staging,)
        start = 0
        while start < len(offer.keys):
            rows = shelf.take_rows(min(len(offer.keys) - start, self._part_blocks), _ROOM_TIMEOUT_S, pools)
            if not len(rows):
                shelf.counters.count_dropped("no_host_row", len(offer.keys) - start)
                break
            self._offload_part(offer, slice(start, start + len(rows)), rows)
            start += len(rows)

    def _offload_part(self, offer: _Offer, part: slice, rows: SlotIds) -> None:
        shelf = self._shelf
        keys, parents = offer.keys[part], offer.parents[part]
        try:
            started_s = time.perf_counter()
            done = self._device.read(offer.device_slots[part], shelf.rows, rows, after=offer.fences)
            if not done.all():
                shelf.counters.count_dropped("offload_error", len(keys))
                return
            shelf.count_host_write(rows, time.perf_counter() - started_s)
            digests = digest_rows(shelf.rows, rows, digest_seeds(keys), self._block_bytes)
            if shelf.host.num_slots:
                rows = shelf.keep_in_host(keys, rows, parents)
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
        names = [ROOT_NAME if parent is None else parent for parent in parents]
        recorded = not keys or (disk.journal.put(keys, names, slots[done], digests) and disk.generation == generation)
        with shelf.changed:
            if keys and recorded:
                shelf.disk_digests[slots[done]] = digests
                registered = pool.register(keys, slots[done])
                slots = np.concatenate((registered.slots, slots[~done]))
                shelf.events.stored_runs(
                    "disk", [keys[i] for i in registered.new], [parents[i] for i in registered.new]
                )
            pool.release(slots)
        shelf.counters.count_dropped("disk_write_failed", len(slots) - (len(keys) if recorded else 0))
