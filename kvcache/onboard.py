"""Brings blocks up: host rows to the device; disk slots to rows in host or device memory, checked there, and to the device.

Blocks from disk stay in the host tier afterwards, where there is one. A block that cannot be read is read once more; one that
still cannot, or reads back with another digest, is forgotten, counted and computed again.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.device_path import DevicePaths, DirectPath, HostPath
from dynamo.kvcache.eviction import OpenUse
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.layerwise import LayerLoad
from dynamo.kvcache.planner import LoadPlanner, growing_parts
from dynamo.kvcache.shelf import Hold, Shelf
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.mover import Mover, Part, Priority
from dynamo.tiers.tier import Outcomes, SlotIds
from dynamo.tiers.transfer import Transfer

__all__ = ["SOURCES", "Load", "LoadRequest", "Onboarder"]

SOURCES = ("host", "disk")
"""Tiers that blocks are loaded from, nearest first."""

logger = logging.getLogger(__name__)

_NUM_READS = 2  # of a block that the disk fails to give
_FIRST_PART_BYTES = 64 << 10  # smaller parts cost more than they take


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
        priority: who wants them.
        from_end: the last ones first, for a caller who computes from the start meanwhile.
    """

    chain: list[BlockKey]
    first: int
    device_slots: SlotIds
    fences: list[Fence]
    sources: npt.NDArray[np.uint8]
    use: OpenUse | None = None
    priority: Priority = Priority.LOAD
    from_end: bool = False


@dataclass(frozen=True, slots=True)
class _Places:
    """Blocks of a request: their positions in it, ascending, and the host or disk slots they lie in."""

    positions: SlotIds
    slots: SlotIds

    def cut(self, which: slice | Outcomes) -> "_Places":
        return _Places(self.positions[which], self.slots[which])


class Load(Transfer):
    """Blocks on their way from host and disk into a request's device slots. Made by `Onboarder.load`.

    Attributes:
        request: what is wanted.
        hold: pins the blocks below the device until all parts that had begun have ended.
        in_host: blocks that lay in the host tier at the start, and stay there as long as they are held.
        on_disk: blocks that lay on disk only.
    """

    def __init__(self, request: LoadRequest, hold: Hold, in_host: _Places, on_disk: _Places, timeout_s: float) -> None:
        super().__init__(len(request.device_slots), timeout_s)
        self.request = request
        self.hold = hold
        self.in_host = in_host
        self.on_disk = on_disk

    def keys(self, places: _Places) -> list[BlockKey]:
        """Keys of blocks."""
        chain, first = self.request.chain, self.request.first
        return [chain[first + position] for position in places.positions.tolist()]

    def parents(self, places: _Places) -> list[BlockKey | None]:
        """Keys of the blocks before them."""
        chain, first = self.request.chain, self.request.first
        return [chain[first + position - 1] if first + position else None for position in places.positions.tolist()]


class Onboarder:
    """Loads blocks on the mover's threads. Thread-safe."""

    def __init__(
        self,
        shelf: Shelf,
        device: DeviceTier,
        paths: DevicePaths,
        mover: Mover,
        planner: LoadPlanner,
        *,
        part_blocks: int,
    ) -> None:
        """Up to `part_blocks` blocks are loaded at a time, and `planner` is told how fast. Owns none of the others."""
        self._shelf = shelf
        self._device = device
        self._paths = paths
        self._mover = mover
        self._part_blocks = part_blocks
        self._planner = planner
        self._first_part_blocks = max(1, _FIRST_PART_BYTES // device.layout.slot_bytes)
        self._load_numbers = count()
        self._block_bytes = device.layout.block_bytes
        self._corruption_logged = False

    def load(self, request: LoadRequest, timeout_s: float) -> Load:
        """Starts loading blocks into device slots that the caller holds until the transfer has ended."""
        load = self._plan(request, timeout_s)
        number = next(self._load_numbers)
        parts = {
            "host": self._parts(load, number, "host", load.in_host, self._load_from_host),
            "disk": self._parts(load, number, "disk", load.on_disk, self._load_from_disk),
        }

        def on_done() -> None:
            self._planner.forget(number)  # parts of a load that was given up are never begun
            self._shelf.let_go(load.hold)

        load.when_ended(self._shelf.wake)  # a part may be waiting for rows
        self._mover.submit(load, parts, on_done, priority=request.priority)
        return load

    def begin_layerwise(self, load: Load) -> LayerLoad:
        """Ends a load, and starts to copy the certain ones of its blocks that have not arrived layer by layer.

        Certain are the leading blocks that have arrived or lie in the host tier, where their bytes were checked. The others
        are given up.
        """
        shelf = self._shelf
        with shelf.changed:
            is_held = load.hold.num_users > 0
            if is_held:
                shelf.share(load.hold)
        load.cancel()
        arrived = load.arrived
        certain = arrived.copy()
        if is_held:
            certain[load.in_host.positions] = True
        num_certain = len(certain) if certain.all() else int(np.argmin(certain))
        lacking = (load.in_host.positions < num_certain) & ~arrived[load.in_host.positions]
        places = load.in_host.cut(lacking & is_held)
        layers = LayerLoad(
            self._device,
            shelf.rows,
            load.request.device_slots[places.positions],
            places.slots,
            num_blocks=num_certain,
            part_blocks=self._part_blocks,
            fences=load.request.fences,
        )

        def on_done() -> None:
            if is_held:
                shelf.let_go(load.hold)

        layers.start(self._mover, on_done)
        shelf.counters.count_hits("host", len(places.slots))
        return layers

    @property
    def num_unfinished(self) -> int:
        """Loads that still hold pins."""
        return self._mover.num_unfinished

    def _plan(self, request: LoadRequest, timeout_s: float) -> Load:
        """Finds where the blocks lie, and holds them there."""
        shelf = self._shelf
        keys = request.chain[request.first : request.first + len(request.device_slots)]
        in_host: list[tuple[int, int]] = []
        on_disk: list[tuple[int, int]] = []
        with shelf.changed:
            hold = shelf.hold([request.chain], [request.use])
            for position, key in enumerate(keys):
                if (slot := shelf.host.find(key)) is not None:
                    in_host.append((position, slot))
                elif (slot := shelf.disk.find(key)) is not None:
                    on_disk.append((position, slot))
                elif request.from_end:  # evicted since the caller looked, who computes it alone
                    shelf.counters.count_fault("missing", 1)
                else:  # what follows is of no use without it
                    shelf.counters.count_fault("missing", len(keys) - position)
                    break
        if on_disk:
            request.sources[[position for position, _ in on_disk]] = SOURCES.index("disk")
        return Load(request, hold, _places(in_host), _places(on_disk), timeout_s)

    def _parts(
        self, load: Load, number: int, tier: str, places: _Places, run: Callable[[Load, _Places], int]
    ) -> list[Part]:
        num_blocks = len(places.slots)
        if num_blocks:
            self._planner.expect(tier, number, num_blocks)
        sizes = growing_parts(num_blocks, self._first_part_blocks, self._part_blocks)
        ends = accumulate(sizes)
        cuts = [
            places.cut(
                slice(num_blocks - end, num_blocks - end + size) if load.request.from_end else slice(end - size, end)
            )
            for end, size in zip(ends, sizes, strict=True)
        ]
        measured = partial(self._run_measured, tier, number, run, load)
        return [Part(partial(measured, cut), len(cut.slots) * self._block_bytes) for cut in cuts]

    def _run_measured(
        self, tier: str, number: int, run: Callable[[Load, _Places], int], load: Load, places: _Places
    ) -> None:
        self._planner.begin_part(tier)
        num_moved = 0
        try:
            num_moved = run(load, places)
        finally:
            self._planner.end_part(tier, number, len(places.slots), num_moved)

    def _load_from_host(self, load: Load, places: _Places) -> int:
        """Returns how many blocks were moved."""
        return self._deliver("host", self._paths.through_host, load, places, places.slots)

    def _load_from_disk(self, load: Load, whole: _Places) -> int:
        """Returns how many blocks were read, whether or not they came in time."""
        shelf = self._shelf
        disk = shelf.disk_tier
        assert disk is not None, "blocks lie on disk only with a disk tier"
        start = int(np.searchsorted(whole.positions, load.floor))  # what lies below it has been computed meanwhile
        num_moved = 0
        while start < len(whole.slots) and not load.is_ended:
            path, num_alike = self._paths.of_blocks(whole.slots[start:])
            rows = shelf.take_rows(num_alike, math.inf, path.load_pools, load.hold, lambda: load.is_due)
            if not len(rows):
                break
            places = whole.cut(slice(start, start + len(rows)))
            start += len(rows)
            num_moved += len(rows)
            try:
                good = self._read_checked(disk, path, load.keys(places), places.slots, rows)
                self._deliver("disk", path, load, places.cut(good), rows[good])
                if good.any() and shelf.is_host_row(rows):
                    kept = places.cut(good)
                    kept_rows = shelf.keep_in_host(load.keys(kept), rows[good], load.parents(kept))
                    rows = np.concatenate((kept_rows, rows[~good]))
            finally:
                shelf.release_rows(rows)
        return num_moved

    def _read_checked(
        self, disk: DiskTier, path: HostPath | DirectPath, keys: list[BlockKey], slots: SlotIds, rows: SlotIds
    ) -> Outcomes:
        """Reads blocks into rows; returns bool [n], True where the bytes are those once written. Forgets the others."""
        shelf = self._shelf
        started_s = time.perf_counter()
        readable = path.read(disk, slots, rows)
        for _ in range(_NUM_READS - 1):
            if not readable.all():
                readable[~readable] = path.read(disk, slots[~readable], rows[~readable])
        shelf.count_host_write(rows[readable], time.perf_counter() - started_s)
        good: Outcomes = readable & path.match(rows, keys, shelf.disk_digests[slots], shelf.disk_digest_kinds[slots])
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

    def _deliver(self, tier: str, path: HostPath | DirectPath, load: Load, places: _Places, rows: SlotIds) -> int:
        """The last hop, for blocks that lie in `rows`. Returns how many of them were still wanted."""
        request, shelf = load.request, self._shelf
        device_slots = request.device_slots[places.positions]
        started_s = time.perf_counter()
        num_wanted = 0

        def write(wanted: Outcomes) -> Outcomes:
            nonlocal num_wanted
            num_wanted = int(np.count_nonzero(wanted))
            written = path.deliver(device_slots[wanted], rows[wanted], request.fences)
            shelf.counters.count_hits(tier, len(written))
            shelf.count_host_read(rows[wanted], time.perf_counter() - started_s)
            return written

        load.deliver(places.positions, write)
        return num_wanted


def _places(pairs: list[tuple[int, int]]) -> _Places:
    positions, slots = np.array(pairs, dtype=np.int64).reshape(-1, 2).T.copy()
    return _Places(positions, slots)
