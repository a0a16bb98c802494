"""Copies committed blocks down: device to rows here, and from there to disk in `DiskWriter`.

    save ──► queue ──► lane "offload": device ─► host rows ──► host pool
                                                     └───────► disk writer

Without a host tier the rows are staging rows, in host memory or, with GPUDirect Storage, in device memory.

Requests that queue up are copied together, since a decoding sequence commits one block at a time. A full queue holds `save`
up for a bounded time, once; from then until the queue is half empty, and wherever a tier has no room, blocks are dropped and
counted.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.device_path import DevicePaths, DirectPath, HostPath
from dynamo.kvcache.disk_writer import DiskWriter
from dynamo.kvcache.eviction import OpenUse
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.layerwise import LayerSave
from dynamo.kvcache.reach import reachable
from dynamo.kvcache.shelf import Hold, Shelf
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.mover import Mover, Part, Priority
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
        layers: has copied layers of some of the blocks already; ended with the request.
    """

    chain: list[BlockKey]
    first: int
    device_slots: SlotIds
    fences: list[Fence]
    release: Callable[[], None]
    use: OpenUse | None = None
    layers: LayerSave | None = None


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

    def cut(self, which: npt.NDArray[np.bool_] | slice) -> "_Offer":
        """Some of the blocks."""
        if isinstance(which, slice):
            keys, parents = self.keys[which], self.parents[which]
        elif which.all():
            return self
        else:
            selectors = which.tolist()
            keys, parents = list(compress(self.keys, selectors)), list(compress(self.parents, selectors))
        return _Offer(self.chains, self.uses, keys, parents, self.device_slots[which], self.fences)


class Offloader:
    """Copies offered blocks down, and owns the disk writer. Thread-safe."""

    def __init__(
        self,
        shelf: Shelf,
        device: DeviceTier,
        paths: DevicePaths,
        mover: Mover,
        *,
        part_blocks: int,
        max_pending_blocks: int,
    ) -> None:
        """Owns none of what it is given.

        Args:
            mover: runs it all.
            part_blocks: blocks copied at a time.
            max_pending_blocks: offered blocks, and so device pins, that may wait to be copied.
        """
        self._shelf = shelf
        self._device = device
        self._paths = paths
        self._mover = mover
        self._part_blocks = part_blocks
        self._max_pending_blocks = max_pending_blocks
        self._settled = threading.Condition()  # guards all below; notified when a count falls
        self._num_pending = 0
        self._has_failed = False
        self._num_saving_layers = 0
        self._closing = False
        self._congested = False
        self._is_scheduled = False
        self._requests: deque[SaveRequest] = deque()
        self._touches: dict[BlockKey, tuple[list[BlockKey], OpenUse | None]] = {}  # chains, by their last block
        self._line = mover.line("offload", Priority.OFFLOAD)
        self._writer: DiskWriter | None = None
        if shelf.disk_tier:
            self._writer = DiskWriter(
                shelf, shelf.disk_tier, paths, mover, part_blocks=part_blocks, block_bytes=device.layout.block_bytes
            )

    @property
    def num_pending_blocks(self) -> int:
        """Offered blocks that lie in device memory only."""
        return self._num_pending

    @property
    def num_saving_layers(self) -> int:
        """Sequences that are being saved layer by layer and are not committed yet."""
        return self._num_saving_layers

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
                self._requests.append(request)
                self._schedule()
            else:
                self._congested = True
        if not taken:
            self._shelf.counters.count_dropped("closing" if self._closing else "offload_queue_full", count)
            request.release()
            if request.layers:
                self.abandon(request.layers)
        return taken

    def begin_layers(self, request: SaveRequest) -> LayerSave | None:
        """Prepares to save blocks layer by layer that are not committed yet; None without a host tier.

        Args:
            request: with pins of its own; its `release` is called when the layers have ended.
        """
        if not self._shelf.host.num_slots or self._closing:
            request.release()
            return None
        with self._settled:
            self._num_saving_layers += 1

        def release() -> None:
            with self._settled:
                self._num_saving_layers -= 1
            request.release()

        return LayerSave(self._shelf, self._device, request.chain, request.first, request.device_slots, release)

    def save_layer(self, layers: LayerSave, layer: int, fences: list[Fence]) -> None:
        """Copies a layer that is computed, behind all that was offered before; not after `close`. Does not wait."""
        self._line.put(Part(partial(layers.copy, layer, fences), self._device.layout.block_bytes))

    def abandon(self, layers: LayerSave) -> None:
        """Ends what `begin_layers` began, when it does not come to a commit."""
        if not self._line.put(Part(layers.end, 0)):  # the mover is closed, and nothing copies layers any more
            layers.end()

    def touch(self, chain: list[BlockKey], use: OpenUse | None = None) -> None:
        """`Shelf.touch`, later and on the mover's thread, to keep it off the caller's path."""
        with self._settled:
            self._touches[chain[-1]] = (chain, use)
            if len(self._touches) > _MAX_TOUCHES:  # the oldest: it would be the first to lose its place anyway
                del self._touches[next(iter(self._touches))]
            self._schedule()

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything offered so far is in its tiers or dropped; False if that took longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._settled:
            if not self._settled.wait_for(lambda: not self._num_pending, timeout_s):
                return False
        return self._writer is None or self._writer.wait_settled(max(0.0, deadline - time.monotonic()))

    def close(self, timeout_s: float) -> None:
        """Takes no more offers and finishes what is pending, all within `timeout_s`; the mover ends the threads."""
        with self._settled:
            self._closing = True
            self._settled.notify_all()
        if not self.flush(timeout_s):
            logger.error("KV blocks are still being offloaded after %g s; going on without them", timeout_s)

    def _has_room(self, count: int) -> bool:
        return self._closing or not self._num_pending or self._num_pending + count <= self._max_pending_blocks

    def _schedule(self) -> None:
        """Makes sure that `_run` will run. The caller holds the lock."""
        if not self._is_scheduled:
            part = Part(self._run, self._part_blocks * self._device.layout.block_bytes)
            self._is_scheduled = self._line.put(part)

    def _run(self) -> None:
        with self._settled:
            self._is_scheduled = False
            requests = self._collect()
            touches, self._touches = self._touches, {}
            if self._requests:
                self._schedule()
        try:
            for request in requests:
                if request.layers:
                    request.layers.adopt()
            if requests:
                self._offload(self._merge(requests))
            for chain, use in touches.values():
                self._shelf.touch(chain, use)
        except Exception:
            if not self._has_failed:  # what fails once is likely to fail at every step
                self._has_failed = True
                logger.exception(
                    "offloading KV blocks failed; they stay in device memory only. Further failures are only counted"
                )
            self._shelf.counters.count_dropped("offload_error", sum(len(r.device_slots) for r in requests))
        finally:
            for request in requests:
                request.release()
                if request.layers:
                    request.layers.end()
            with self._settled:
                self._num_pending -= sum(len(request.device_slots) for request in requests)
                self._settled.notify_all()

    def _collect(self) -> list[SaveRequest]:
        """The next request, and what has queued behind it up to about one part. The caller holds the lock."""
        requests: list[SaveRequest] = []
        num_blocks = 0
        while self._requests and num_blocks < self._part_blocks:
            requests.append(self._requests.popleft())
            num_blocks += len(requests[-1].device_slots)
        return requests

    def _merge(self, requests: list[SaveRequest]) -> _Offer:
        """Those of the offered blocks that the tier below admits and lacks, each once."""
        requests = _joined(requests)
        keys, parents, slots = self._admitted(requests[0])
        if len(requests) > 1:
            places = dict(zip(keys, zip(parents, slots.tolist(), strict=True), strict=True))
            for request in requests[1:]:
                keys, parents, slots = self._admitted(request)
                places.update(zip(keys, zip(parents, slots.tolist(), strict=True), strict=True))
            keys = list(places)
            parents = [parent for parent, _ in places.values()]
            slots = np.array([slot for _, slot in places.values()], dtype=np.int64)
        fences = [fence for request in requests for fence in request.fences]
        shelf = self._shelf
        with shelf.changed:
            lacking = (shelf.host if shelf.host.num_slots else shelf.disk).locate(keys) < 0
        chains, uses = [request.chain for request in requests], [request.use for request in requests]
        return _Offer(chains, uses, keys, parents, slots, fences).cut(lacking)

    def _admitted(self, request: SaveRequest) -> tuple[list[BlockKey], list[BlockKey | None], SlotIds]:
        """Keys, parents and device slots of those of the offered blocks that may lie in the tier below."""
        tier = "host" if self._shelf.host.num_slots else "disk"
        chain, first = request.chain, request.first
        end = max(first, self._shelf.admitted(tier, chain, request.use))
        parents: list[BlockKey | None] = [chain[first - 1] if first else None, *chain[first : end - 1]]
        return chain[first:end], parents[: end - first], request.device_slots[: end - first]

    def _offload(self, offer: _Offer) -> None:
        shelf = self._shelf
        hold = shelf.hold(offer.chains, offer.uses)
        try:
            rest = self._offload_to_host(offer, hold) if shelf.host.num_slots else offer
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
            absent = shelf.host.locate(offer.keys) < 0  # as of now, with the prefixes held
            has_prefix = reachable(shelf.host, offer.keys, offer.parents)
        wanted = offer.cut(absent & has_prefix)
        start = 0
        while start < len(wanted.keys):
            count = min(len(wanted.keys) - start, self._part_blocks)
            rows = shelf.take_rows(count, _ROOM_TIMEOUT_S, (shelf.host,), hold, self._is_futile)
            if not len(rows):  # what is there already is worth more than its own continuation
                break
            part = wanted.cut(slice(start, start + len(rows)))
            start += len(rows)
            try:
                if self._copy(self._paths.through_host, part, rows):
                    rows = shelf.keep_in_host(part.keys, rows, part.parents)
                    hold.host, rows = np.concatenate((hold.host, rows)), rows[:0]
            finally:
                shelf.release_rows(rows)
        left = absent.copy()
        left[np.flatnonzero(absent & has_prefix)[:start]] = False
        return offer.cut(left)

    def _is_futile(self) -> bool:
        """Whether rows that others hold will not be given back soon.

        So it is when the disk they wait for does not keep up; and when neither disk nor loads hold them, but sequences
        that are saved by layers, whose rows are given back behind what waits here.
        """
        writer = self._writer
        if writer is not None and writer.num_writing_blocks:
            return writer.is_behind
        return not self._mover.num_unfinished

    def _offload_to_staging(self, offer: _Offer, hold: Hold, writer: DiskWriter) -> _Offer:
        """Sends blocks to disk through staging rows; returns what had no place."""
        shelf, path = self._shelf, self._paths.preferred
        start = 0
        while start < len(offer.keys):
            count = min(len(offer.keys) - start, self._part_blocks)
            rows = shelf.take_rows(count, _ROOM_TIMEOUT_S, path.save_pools, hold, self._is_futile)
            if not len(rows):
                break
            part = offer.cut(slice(start, start + len(rows)))
            start += len(rows)
            try:
                if self._copy(path, part, rows) and writer.put(hold, part.keys, part.parents, rows):
                    rows = rows[:0]  # the disk writer gives them back
            finally:
                shelf.release_rows(rows)
        return offer.cut(slice(start, None))

    def _copy(self, path: HostPath | DirectPath, part: _Offer, rows: SlotIds) -> bool:
        started_s = time.perf_counter()
        done = path.fetch(part.device_slots, rows, part.fences)
        if not done.all():
            self._shelf.counters.count_dropped("offload_error", len(rows))
            return False
        self._shelf.count_host_write(rows, time.perf_counter() - started_s)
        return True


def _joined(requests: list[SaveRequest]) -> list[SaveRequest]:
    """The requests, of which those that go on with the chain of an earlier one are joined to it."""
    joined: dict[BlockKey, SaveRequest] = {}  # by the last block
    for request in requests:
        parent = request.chain[request.first - 1] if request.first else None
        earlier = joined.get(parent) if parent is not None else None
        if earlier is not None and len(earlier.chain) == request.first:
            del joined[earlier.chain[-1]]
            request = replace(
                request,
                first=earlier.first,
                device_slots=np.concatenate((earlier.device_slots, request.device_slots)),
                fences=[*earlier.fences, *request.fences],
            )
        same = joined.get(request.chain[-1])
        if same is None or request.first < same.first:
            joined[request.chain[-1]] = request
    return list(joined.values())
