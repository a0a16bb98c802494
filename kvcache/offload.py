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
import numpy.typing as npt

from dynamo.kernels.digest import digest_rows
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.shelf import Digests, Hold, Shelf, digest_seeds
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.tier import SlotIds

__all__ = ["Offloader", "SaveRequest"]

logger = logging.getLogger(__name__)

_ROOM_TIMEOUT_S = 10.0  # a block whose way down is barred for so long is dropped
_MAX_TOUCHES = 1024
_MAX_QUEUED_WRITES = 8  # parts; bounds the host rows that are pinned for the disk


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Blocks offered to the tiers below.

    Attributes:
        chain: keys of the whole sequence so far.
        first: position in `chain` of the first offered block; all from there on are offered.
        device_slots: where the offered blocks lie. Pinned until `release` is called.
        fences: points in CUDA streams after which their bytes are written; none on CPU.
        release: gives the pins back. Called exactly once, on any thread.
    """

    chain: list[BlockKey]
    first: int
    device_slots: SlotIds
    fences: list[Fence]
    release: Callable[[], None]


class _Touch:
    """In the queue: chains wait to be touched."""


_TOUCH = _Touch()


@dataclass(frozen=True, slots=True)
class _Offer:
    """Blocks of one or several requests, not yet in the tier below; distinct keys, parents before children.

    Attributes:
        chains: keys of the sequences they belong to.
    """

    chains: list[list[BlockKey]]
    keys: list[BlockKey]
    parents: list[BlockKey | None]
    device_slots: SlotIds
    fences: list[Fence]

    def cut(self, which: slice | npt.NDArray[np.bool_]) -> "_Offer":
        """Some of the blocks."""
        places = np.arange(len(self.keys))[which].tolist()
        return _Offer(
            self.chains,
            [self.keys[place] for place in places],
            [self.parents[place] for place in places],
            self.device_slots[which],
            self.fences,
        )


@dataclass(frozen=True, slots=True)
class _DiskWrite:
    """Blocks on their way to disk. `hold` has their host rows; staging rows come with a reference of their own."""

    keys: list[BlockKey]
    parents: list[BlockKey | None]
    rows: SlotIds
    digests: Digests
    hold: Hold


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
        self._is_disk_behind = False
        self._being_written: set[BlockKey] = set()  # guarded by the shelf's lock
        self._requests: queue.SimpleQueue[SaveRequest | _Touch | None] = queue.SimpleQueue()
        self._touches: dict[BlockKey, list[BlockKey]] = {}  # chains to be touched, by their last block
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
            self._touches[chain[-1]] = chain
            if len(self._touches) > _MAX_TOUCHES:  # the oldest: it would be the first to lose its place anyway
                del self._touches[next(iter(self._touches))]
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
        chains |= {request.chain[-1]: request.chain for request in requests}
        for chain in chains.values():
            self._shelf.touch(chain)

    def _merge(self, requests: list[SaveRequest]) -> _Offer:
        shelf = self._shelf
        places: dict[BlockKey, tuple[BlockKey | None, int]] = {}
        with shelf.changed:
            for request in requests:
                for position, slot in enumerate(request.device_slots.tolist(), request.first):
                    key = request.chain[position]
                    if key not in shelf.host and (shelf.host.num_slots or key not in shelf.disk):
                        places[key] = (request.chain[position - 1] if position else None, slot)
        return _Offer(
            [request.chain for request in requests],
            list(places),
            [parent for parent, _ in places.values()],
            np.array([slot for _, slot in places.values()], dtype=np.int64),
            [fence for request in requests for fence in request.fences],
        )

    def _offload(self, offer: _Offer) -> None:
        shelf = self._shelf
        hold = shelf.hold(offer.chains)
        try:
            rest = self._offload_to_host(offer, hold)
            if shelf.disk_tier:
                self._queue_host_rows(offer.chains)
                rest = self._offload_to_staging(rest, hold)
            shelf.counters.count_dropped("no_host_row", len(rest.keys))
        finally:
            shelf.let_go(hold)

    def _offload_to_host(self, offer: _Offer, hold: Hold) -> _Offer:
        """Copies to the host tier what has its parent there; returns what had no place."""
        shelf = self._shelf
        with shelf.changed:
            reachable: set[BlockKey | None] = {None}
            mask = []
            for key, parent in zip(offer.keys, offer.parents, strict=True):
                mask.append(key not in shelf.host and (parent in reachable or parent in shelf.host))
                if mask[-1]:
                    reachable.add(key)
            absent = np.array([key not in shelf.host for key in offer.keys], dtype=np.bool_)
        chosen = np.array(mask, dtype=np.bool_)
        wanted = offer.cut(chosen)
        while len(wanted.keys):
            rows = shelf.take_rows(
                min(len(wanted.keys), self._part_blocks),
                _ROOM_TIMEOUT_S,
                (shelf.host,),
                hold,
                lambda: self._is_disk_behind,
            )
            if not len(rows):  # what is there already is worth more than its own continuation
                break
            part, wanted = wanted.cut(slice(len(rows))), wanted.cut(slice(len(rows), None))
            try:
                if self._copy(part, rows):
                    rows = shelf.keep_in_host(part.keys, rows, part.parents)
                    hold.host, rows = np.concatenate((hold.host, rows)), rows[:0]
            finally:
                shelf.release_rows(rows)
        left = set(wanted.keys)
        return offer.cut(np.array([key in left for key in offer.keys], dtype=np.bool_) | (absent & ~chosen))

    def _offload_to_staging(self, offer: _Offer, hold: Hold) -> _Offer:
        """Sends blocks to disk through staging rows; returns what had no place."""
        shelf = self._shelf
        while len(offer.keys):
            count = min(len(offer.keys), self._part_blocks)
            rows = shelf.take_rows(count, _ROOM_TIMEOUT_S, (shelf.staging,), hold, lambda: self._is_disk_behind)
            if not len(rows):
                break
            part, offer = offer.cut(slice(len(rows))), offer.cut(slice(len(rows), None))
            try:
                if self._copy(part, rows) and self._queue_write(part.chains, part.keys, part.parents, rows):
                    rows = rows[:0]  # the disk thread gives them back
            finally:
                shelf.release_rows(rows)
        return offer

    def _copy(self, part: _Offer, rows: SlotIds) -> bool:
        started_s = time.perf_counter()
        done = self._device.read(part.device_slots, self._shelf.rows, rows, after=part.fences)
        if not done.all():
            self._shelf.counters.count_dropped("offload_error", len(rows))
            return False
        self._shelf.count_host_write(rows, time.perf_counter() - started_s)
        return True

    def _queue_host_rows(self, chains: list[list[BlockKey]]) -> None:
        """Sends to disk what the host tier has of `chains` and the disk tier lacks, be it new, lost or refused before."""
        shelf = self._shelf
        parent_of = {key: parent for chain in chains for key, parent in zip(chain, (None, *chain), strict=False)}
        with shelf.changed:
            lacking = [key for key in parent_of if key in shelf.host and key not in shelf.disk]
            lacking = [key for key in lacking if key not in self._being_written]
            rows = shelf.host.find_any(lacking)
        for start in range(0, len(lacking), self._part_blocks):
            keys = lacking[start : start + self._part_blocks]
            self._queue_write(chains, keys, [parent_of[key] for key in keys], rows[start : start + len(keys)])

    def _queue_write(
        self, chains: list[list[BlockKey]], keys: list[BlockKey], parents: list[BlockKey | None], rows: SlotIds
    ) -> bool:
        """Hands blocks to the disk thread, and with them staging rows; False if its queue is full."""
        shelf = self._shelf
        # Of the rows as they are now: an equal block that came from disk meanwhile may be rounded otherwise.
        digests = digest_rows(shelf.rows, rows, digest_seeds(keys), self._block_bytes)
        with self._settled:
            self._num_writing += len(keys)
        with shelf.changed:
            self._being_written.update(keys)
        write = _DiskWrite(keys, parents, rows, digests, shelf.hold(chains))
        try:
            # A disk that is too slow holds the host tier up once, and not again before it has written something.
            self._writes.put(write, timeout=0.0 if self._is_disk_behind else _ROOM_TIMEOUT_S)
        except queue.Full:
            self._is_disk_behind = True
            shelf.counters.count_dropped("disk_queue_full", len(keys))
            self._settle_write(write)
            return False
        return True

    def _settle_write(self, write: _DiskWrite) -> None:
        with self._shelf.changed:
            self._being_written.difference_update(write.keys)
        self._shelf.let_go(write.hold)
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
                self._is_disk_behind = False
                if not self._shelf.is_host_row(write.rows):
                    self._shelf.release_rows(write.rows)
                self._settle_write(write)

    def _write(self, disk: DiskTier, write: _DiskWrite) -> None:
        shelf = self._shelf
        shelf.notice_lost_disk()
        generation = disk.generation
        with shelf.changed:
            # Of what is on disk now: blocks that were queued before these may have been written meanwhile.
            hold = shelf.hold(write.hold.chains)
            reachable: set[BlockKey | None] = {None}
            wanted = []
            num_absent = sum(key not in shelf.disk for key in write.keys)
            for i, (key, parent) in enumerate(zip(write.keys, write.parents, strict=True)):
                if parent in reachable or parent in shelf.disk:  # behind its parent, or nobody would find it
                    reachable.add(key)
                    if key not in shelf.disk:
                        wanted.append(i)
        fresh = np.array(wanted, dtype=np.int64)
        room = shelf.take_disk_slots(len(fresh))
        held = room.slots
        was_refused = False
        try:
            shelf.counters.count_dropped("no_disk_slot", num_absent - len(held))
            # Recorded before the slots are overwritten, so that a crash in between leaves no name for other bytes.
            shelf.record_drop(room.evicted_keys, room.evicted_slots)
            stored = fresh[: len(held)]
            done = disk.write(held, shelf.rows, write.rows[stored])
            was_refused = not done.all()
            slots, stored = held[done], stored[done]
            keys = [write.keys[i] for i in stored.tolist()]
            parents = [write.parents[i] for i in stored.tolist()]
            digests = write.digests[stored]
            names = [ROOT_NAME if parent is None else parent for parent in parents]
            recorded = not keys or (disk.journal.put(keys, names, slots, digests) and disk.generation == generation)
            shelf.counters.count_dropped("disk_write_failed", len(held) - (len(keys) if recorded else 0))
            if keys and recorded:
                kept = shelf.keep_on_disk(keys, slots, parents, digests)
                hold.disk = np.concatenate((hold.disk, kept))
                held = held[~done]
        finally:
            with shelf.changed:
                shelf.disk.release(held)
                shelf.let_go(hold)
            if was_refused:
                shelf.limit_disk()
