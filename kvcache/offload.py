"""Copies committed blocks down: device to host rows on one thread, and from there to disk on `DiskWriter`'s.

    save ──► queue ──► offload thread: device ─► host rows ──► host pool
                                                     └───────► disk writer

Requests that queue up are copied together, since a decoding sequence commits one block at a time. A full queue holds `save`
up for a bounded time, once; from then until the queue is half empty, and wherever a tier has no room, blocks are dropped and
counted.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.disk_writer import DiskWriter
from dynamo.kvcache.eviction import OpenUse
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.shelf import Hold, Shelf
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.tier import SlotIds

__all__ = ["Offloader", "SaveRequest"]

logger = logging.getLogger(__name__)

_ROOM_TIMEOUT_S = 10.0  # a block whose way down is barred for so long is dropped
_MAX_TOUCHES = 1024


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Blocks offered to the tiers below.

    Attributes:
        chain: keys of the whole sequence so far.
        first: position in `chain` of the first offered block; all from there on are offered.
        device_slots: where the offered blocks lie. Pinned until `release` is called.
        fences: points in CUDA streams after which their bytes are written; none on CPU.
        release: gives the pins back. Called exactly once, on any thread.
        use: what the sequence uses its chain for.
    """

    chain: list[BlockKey]
    first: int
    device_slots: SlotIds
    fences: list[Fence]
    release: Callable[[], None]
    use: OpenUse | None = None


class _Touch:
    """In the queue: chains wait to be touched."""


_TOUCH = _Touch()


@dataclass(frozen=True, slots=True)
class _Offer:
    """Blocks of one or several requests, not yet in the tier below; distinct keys, parents before children.

    Attributes:
        chains: keys of the sequences they belong to.
        uses: of the chains, one for each.
    """

    chains: list[list[BlockKey]]
    uses: list[OpenUse | None]
    keys: list[BlockKey]
    parents: list[BlockKey | None]
    device_slots: SlotIds
    fences: list[Fence]

    def cut(self, which: slice | npt.NDArray[np.bool_]) -> "_Offer":
        """Some of the blocks."""
        places = range(len(self.keys))[which] if isinstance(which, slice) else np.flatnonzero(which).tolist()
        return _Offer(
            self.chains,
            self.uses,
            [self.keys[place] for place in places],
            [self.parents[place] for place in places],
            self.device_slots[which],
            self.fences,
        )


class Offloader:
    """Owns the offload thread and the disk writer. Thread-safe."""

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
        self._settled = threading.Condition()  # guards the counts; notified when one falls
        self._num_pending = 0
        self._closing = False
        self._congested = False
        self._requests: queue.SimpleQueue[SaveRequest | _Touch | None] = queue.SimpleQueue()
        self._touches: dict[BlockKey, tuple[list[BlockKey], OpenUse | None]] = {}  # chains, by their last block
        self._writer: DiskWriter | None = None
        if shelf.disk_tier:
            self._writer = DiskWriter(
                shelf, shelf.disk_tier, part_blocks=part_blocks, block_bytes=device.layout.block_bytes
            )
        self._thread = threading.Thread(target=self._run, name="kv-offload", daemon=True)
        self._thread.start()

    @property
    def num_pending_blocks(self) -> int:
        """Offered blocks that still wait for the offload thread."""
        return self._num_pending

    @property
    def num_writing_blocks(self) -> int:
        """Blocks that lie in host rows and are on their way to disk."""
        return self._writer.num_writing_blocks if self._writer else 0

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

    def touch(self, chain: list[BlockKey], use: OpenUse | None = None) -> None:
        """`Shelf.touch`, later and on the offload thread, to keep it off the caller's path."""
        with self._settled:
            is_first = not self._touches
            self._touches[chain[-1]] = (chain, use)
            if len(self._touches) > _MAX_TOUCHES:  # the oldest: it would be the first to lose its place anyway
                del self._touches[next(iter(self._touches))]
        if is_first:
            self._requests.put(_TOUCH)

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything offered so far is in its tiers or dropped; False if that took longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._settled:
            if not self._settled.wait_for(lambda: not self._num_pending, timeout_s):
                return False
        return self._writer is None or self._writer.wait_settled(max(0.0, deadline - time.monotonic()))

    def close(self, timeout_s: float) -> None:
        """Finishes what is pending and ends the threads, all within `timeout_s`; a thread that hangs is left behind."""
        deadline = time.monotonic() + timeout_s
        with self._settled:
            self._closing = True
            self._settled.notify_all()
        self.flush(timeout_s)
        self._requests.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.error("KV blocks are still being offloaded after %g s; going on without them", timeout_s)
        if self._writer:
            self._writer.close(max(0.0, deadline - time.monotonic()))

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
        chains |= {request.chain[-1]: (request.chain, request.use) for request in requests}
        for chain, use in chains.values():
            self._shelf.touch(chain, use)

    def _merge(self, requests: list[SaveRequest]) -> _Offer:
        shelf = self._shelf
        places: dict[BlockKey, tuple[BlockKey | None, int]] = {}
        tier = "host" if shelf.host.num_slots else "disk"
        with shelf.changed:
            for request in requests:
                num_admitted = shelf.admitted(tier, request.chain, request.use) - request.first
                for position, slot in enumerate(request.device_slots[: max(0, num_admitted)].tolist(), request.first):
                    key = request.chain[position]
                    if key not in shelf.host and (shelf.host.num_slots or key not in shelf.disk):
                        places[key] = (request.chain[position - 1] if position else None, slot)
        return _Offer(
            [request.chain for request in requests],
            [request.use for request in requests],
            list(places),
            [parent for parent, _ in places.values()],
            np.array([slot for _, slot in places.values()], dtype=np.int64),
            [fence for request in requests for fence in request.fences],
        )

    def _offload(self, offer: _Offer) -> None:
        shelf = self._shelf
        hold = shelf.hold(offer.chains, offer.uses)
        try:
            rest = self._offload_to_host(offer, hold)
            if self._writer:
                chains = [
                    chain[: shelf.admitted("disk", chain, use)]
                    for chain, use in zip(offer.chains, offer.uses, strict=True)
                ]
                self._writer.put_host_rows(chains, hold)
                admitted = {key for chain in chains for key in chain}
                rest = rest.cut(np.array([key in admitted for key in rest.keys], dtype=np.bool_))
                rest = self._offload_to_staging(rest, hold, self._writer)
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
        start = 0
        while start < len(wanted.keys):
            count = min(len(wanted.keys) - start, self._part_blocks)
            rows = shelf.take_rows(count, _ROOM_TIMEOUT_S, (shelf.host,), hold, self._is_futile)
            if not len(rows):  # what is there already is worth more than its own continuation
                break
            part = wanted.cut(slice(start, start + len(rows)))
            start += len(rows)
            try:
                if self._copy(part, rows):
                    rows = shelf.keep_in_host(part.keys, rows, part.parents)
                    hold.host, rows = np.concatenate((hold.host, rows)), rows[:0]
            finally:
                shelf.release_rows(rows)
        left = set(wanted.keys[start:])
        return offer.cut(np.array([key in left for key in offer.keys], dtype=np.bool_) | (absent & ~chosen))

    def _is_futile(self) -> bool:
        """Whether rows that others hold will not be given back soon, since the disk they wait for does not keep up."""
        return self._writer is not None and self._writer.is_behind

    def _offload_to_staging(self, offer: _Offer, hold: Hold, writer: DiskWriter) -> _Offer:
        """Sends blocks to disk through staging rows; returns what had no place."""
        shelf = self._shelf
        start = 0
        while start < len(offer.keys):
            count = min(len(offer.keys) - start, self._part_blocks)
            rows = shelf.take_rows(count, _ROOM_TIMEOUT_S, (shelf.staging,), hold, self._is_futile)
            if not len(rows):
                break
            part = offer.cut(slice(start, start + len(rows)))
            start += len(rows)
            try:
                if self._copy(part, rows) and writer.put(hold, part.keys, part.parents, rows):
                    rows = rows[:0]  # the disk thread gives them back
            finally:
                shelf.release_rows(rows)
        return offer.cut(slice(start, None))

    def _copy(self, part: _Offer, rows: SlotIds) -> bool:
        started_s = time.perf_counter()
        done = self._device.read(part.device_slots, self._shelf.rows, rows, after=part.fences)
        if not done.all():
            self._shelf.counters.count_dropped("offload_error", len(rows))
            return False
        self._shelf.count_host_write(rows, time.perf_counter() - started_s)
        return True
