"""Brings blocks up: host rows to the device; disk slots to host rows, checked there, and on to the device.

Blocks from disk stay in the host tier afterwards. A block that cannot be read, or reads back with another digest, is
forgotten, counted and computed again.
"""

import logging
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from dynamo.kernels.digest import digest_rows
from dynamo.kvcache.eviction import OpenUse
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.shelf import Hold, Shelf, digest_seeds
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.mover import Mover, Part, Transfer
from dynamo.tiers.tier import Outcomes, SlotIds

__all__ = ["SOURCES", "LoadRequest", "Onboarder"]

SOURCES = ("host", "disk")
"""Tiers that blocks are loaded from, nearest first."""

logger = logging.getLogger(__name__)

_NUM_THREADS = {"host": 2, "disk": 4}


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Blocks wanted in device memory.

    Attributes:
        chain: keys of the whole sequence so far.
        first: position in `chain` of the first wanted block.
        device_slots: where the wanted blocks go, one slot for each.
        fences: points in CUDA streams after which nothing uses the slots' former content; none on CPU.
        sources: uint8 [n], one for each wanted block; `load` writes into it where the block is read from, as a place in
            `SOURCES`.
        use: what the sequence uses its chain for.
    """

    chain: list[BlockKey]
    first: int
    device_slots: SlotIds
    fences: list[Fence]
    sources: npt.NDArray[np.uint8]
    use: OpenUse | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Some blocks of a request: their positions in it, and the host or disk slots they lie in, which `hold` pins."""

    request: LoadRequest
    transfer: Transfer
    hold: Hold
    positions: SlotIds
    slots: SlotIds

    def cut(self, which: slice | Outcomes) -> "_Part":
        return _Part(self.request, self.transfer, self.hold, self.positions[which], self.slots[which])

    @property
    def keys(self) -> list[BlockKey]:
        request = self.request
        return [request.chain[request.first + position] for position in self.positions.tolist()]

    @property
    def parents(self) -> list[BlockKey | None]:
        chain = self.request.chain
        places = (self.positions + self.request.first).tolist()
        return [chain[place - 1] if place else None for place in places]


class Onboarder:
    """Owns the threads that load blocks. Thread-safe."""

    def __init__(self, shelf: Shelf, device: DeviceTier, *, part_blocks: int) -> None:
        """Starts the threads; `part_blocks` blocks are loaded at a time."""
        self._shelf = shelf
        self._device = device
        self._part_blocks = part_blocks
        self._block_bytes = device.layout.block_bytes
        self._corruption_logged = False
        self._mover = Mover(_NUM_THREADS)

    def load(self, request: LoadRequest, timeout_s: float) -> Transfer:
        """Starts loading blocks into device slots that the caller holds until the transfer has ended."""
        shelf = self._shelf
        keys = request.chain[request.first : request.first + len(request.device_slots)]
        transfer = Transfer(len(keys), timeout_s)
        in_host: list[tuple[int, int]] = []
        on_disk: list[tuple[int, int]] = []
        with shelf.changed:
            hold = shelf.hold([request.chain], [request.use])
            for position, key in enumerate(keys):
                if (slot := shelf.host.find(key)) is not None:
                    in_host.append((position, slot))
                elif (slot := shelf.disk.find(key)) is not None:
                    on_disk.append((position, slot))
                else:  # evicted since the caller looked; what follows is of no use without it
                    shelf.counters.count_fault("missing", len(keys) - position)
                    break
        if on_disk:
            request.sources[[position for position, _ in on_disk]] = SOURCES.index("disk")
        parts: dict[str, list[Part]] = {"host": [], "disk": []}
        for lane, places, load in (
            ("host", in_host, self._load_from_host),
            ("disk", on_disk, self._load_from_disk),
        ):
            for start in range(0, len(places), self._part_blocks):
                positions, slots = np.array(places[start : start + self._part_blocks], dtype=np.int64).T.copy()
                parts[lane].append(partial(load, _Part(request, transfer, hold, positions, slots)))
        self._mover.submit(transfer, parts, on_done=lambda: shelf.let_go(hold))
        return transfer

    @property
    def num_unfinished(self) -> int:
        """Loads that still hold pins."""
        return self._mover.num_unfinished

    def close(self, timeout_s: float) -> None:
        """Waits for the parts that are queued or running, at most `timeout_s`, and ends the threads."""
        self._mover.close(timeout_s)

    def _load_from_host(self, part: _Part) -> None:
        self._deliver("host", part, part.slots, np.ones(len(part.slots), dtype=np.bool_))

    def _load_from_disk(self, whole: _Part) -> None:
        shelf, transfer = self._shelf, whole.transfer
        disk = shelf.disk_tier
        assert disk is not None, "blocks lie on disk only with a disk tier"
        pools = (shelf.host, shelf.staging)
        start = 0
        while start < len(whole.slots) and not transfer.is_ended:
            num_left = len(whole.slots) - start
            rows = shelf.take_rows(num_left, transfer.remaining_s, pools, whole.hold, lambda: transfer.is_ended)
            if not len(rows):
                break
            part = whole.cut(slice(start, start + len(rows)))
            try:
                good = self._read_checked(disk, part.keys, part.slots, rows)
                self._deliver("disk", part, rows, good)
                if good.any() and shelf.is_host_row(rows):
                    kept = part.cut(good)
                    rows = np.concatenate((shelf.keep_in_host(kept.keys, rows[good], kept.parents), rows[~good]))
            finally:
                shelf.release_rows(rows)
            start += len(part.slots)

    def _read_checked(self, disk: DiskTier, keys: list[BlockKey], slots: SlotIds, rows: SlotIds) -> Outcomes:
        """Reads blocks into rows; returns bool [n], True where the bytes are those once written. Forgets the others."""
        shelf = self._shelf
        started_s = time.perf_counter()
        readable = disk.read(slots, shelf.rows, rows)
        shelf.count_host_write(rows[readable], time.perf_counter() - started_s)
        digests = digest_rows(shelf.rows, rows, digest_seeds(keys), self._block_bytes)
        good: Outcomes = readable & (digests == shelf.disk_digests[slots])
        if not good.all() and not shelf.notice_lost_disk():
            shelf.forget_on_disk([key for key, ok in zip(keys, good.tolist(), strict=True) if not ok], slots[~good])
            self._count_bad(int(np.count_nonzero(~readable)), int(np.count_nonzero(readable & ~good)))
        return good

    def _count_bad(self, num_unreadable: int, num_corrupt: int) -> None:
        self._shelf.counters.count_fault("unreadable", num_unreadable)
        self._shelf.counters.count_fault("corrupt", num_corrupt)
        if num_corrupt and not self._corruption_logged:
            self._corruption_logged = True
            logger.warning(
                "%d KV blocks read from disk do not match their digests and are computed again; further ones are only counted",
                num_corrupt,
            )

    def _deliver(self, tier: str, part: _Part, rows: SlotIds, good: Outcomes) -> None:
        """The last hop, for the blocks of `part` in those of `rows` that are `good`."""
        request, positions = part.request, part.positions[good]
        device_slots = request.device_slots[positions]
        shelf = self._shelf
        started_s = time.perf_counter()
        if part.transfer.deliver(
            positions, lambda: self._device.write(device_slots, shelf.rows, rows[good], after=request.fences)
        ):
            shelf.counters.count_hits(tier, len(positions))
            shelf.count_host_read(rows[good], time.perf_counter() - started_s)
