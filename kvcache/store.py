"""Content-addressed blocks of the tiers below the device. This is the seam the device pool looks through.

The host arena is where all paths meet, but for one: without a host tier, disk and device may exchange bytes directly (see
`dynamo.kvcache.device_path`). Without a host tier the arena has staging rows only; with one, staging rows serve loads
when every host slot is pinned. Whatever fails makes a block uncached, never wrong.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from dynamo.kvcache.config import DiskPlace, check_write_budget, format_size
from dynamo.kvcache.device_path import DevicePaths, PathChoice, find_device_path
from dynamo.kvcache.disk_trial import DiskTrial
from dynamo.kvcache.errors import CacheConfigError, UnsupportedError
from dynamo.kvcache.events import EventLog, RunStarts
from dynamo.kvcache.eviction import OpenUse
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.lanes import start_mover
from dynamo.kvcache.layerwise import LayerLoad, LayerSave
from dynamo.kvcache.leases import HeldSlots
from dynamo.kvcache.load_decision import TierRun
from dynamo.kvcache.offload import Offloader, SaveRequest
from dynamo.kvcache.onboard import Load, LoadRequest, Onboarder
from dynamo.kvcache.planner import LoadPlanner
from dynamo.kvcache.policies import Policies
from dynamo.kvcache.pool import BlockPlace, BlockPool
from dynamo.kvcache.removals import Removal
from dynamo.kvcache.shelf import Shelf
from dynamo.kvcache.spec import KVSpec
from dynamo.kvcache.stats import CacheCounters, TierUsage, tier_usage
from dynamo.kvcache.status import Verification
from dynamo.kvcache.tier_resize import TierResizer, check_index_fits
from dynamo.kvcache.verification import DiskVerifier
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierBusyError, TierUnavailableError
from dynamo.tiers.host import HostTier
from dynamo.tiers.memory import available_memory_bytes
from dynamo.tiers.numa import pci_address
from dynamo.tiers.scrub import ScrubStats
from dynamo.tiers.stats import MovedBlocks, TierStats
from dynamo.tiers.write_budget import WriteBudgetStats

__all__ = ["BlockStore"]

logger = logging.getLogger(__name__)

_PART_BYTES = (
    8 << 20
)  # one part of a transfer: large enough for the disk's full speed, small enough to overlap two hops
_RESIZE_TIMEOUT_S = 30.0  # longer than any load
_STAGING_PARTS = 4  # without a host tier; with one, staging is for when all its slots are pinned, and one part will do


class BlockStore:
    """Host and disk tiers behind one index: `count_loadable`, `load(keys → slots)`, `save(slots → keys)`. Thread-safe.

    Owns the host arena, the disk tier and all threads; `close` ends them. Not the device tier.
    """

    def __init__(
        self,
        device: DeviceTier,
        arena: HostTier,
        num_host_slots: int,
        disk: DiskTier | None,
        events: EventLog,
        counters: CacheCounters,
        planner: LoadPlanner,
        *,
        disk_fault: str | None = None,
        policies: Policies | None = None,
        scrub_bytes_per_s: float = 0.0,
    ) -> None:
        """Starts the threads. `open` is the usual way to make one.

        Args:
            arena: its first `num_host_slots` slots are the host tier; it has at least one staging row.
            planner: is told how fast loads are.
            disk_fault: why there is no disk tier although one was asked for.
            scrub_bytes_per_s: how fast the disk tier is checked while nobody else uses it; 0: not at all.
        """
        part_blocks = _part_blocks(device.layout.slot_bytes)
        self._slot_bytes = device.layout.slot_bytes
        self._arena = arena
        self._disk = disk
        self._disk_fault = disk_fault
        self._device_path: PathChoice | None = None
        if disk:
            self._device_path = find_device_path(
                disk, device, keeps_in_host=num_host_slots > 0, num_rows=_STAGING_PARTS * part_blocks
            )
        staging = self._device_path.staging if self._device_path else None
        num_direct_rows = staging.num_slots if staging else 0
        self._shelf = Shelf(arena, num_host_slots, disk, events, counters, policies, num_direct_rows=num_direct_rows)
        paths = DevicePaths(self._shelf, device, staging)
        # As many device slots may be pinned for offloading as leave the sequences most of the pool.
        self._mover = start_mover()
        self._offloader = Offloader(
            self._shelf,
            device,
            paths,
            self._mover,
            part_blocks=part_blocks,
            max_pending_blocks=max(1, device.num_slots // 4),
        )
        self._onboarder = Onboarder(self._shelf, device, paths, self._mover, planner, part_blocks=part_blocks)
        self._verifier: DiskVerifier | None = None
        self._trial: DiskTrial | None = None
        if disk:
            self._trial = DiskTrial(self._shelf, disk, planner)
            self._verifier = DiskVerifier(
                self._shelf, disk, device.layout, part_blocks=part_blocks, scrub_bytes_per_s=scrub_bytes_per_s
            )
        self._num_pinned = 0  # references held by `pin`; guarded by the shelf's lock
        self._resizer = TierResizer(self._shelf, arena, disk)
        self._is_closed = False

    @classmethod
    def open(
        cls,
        spec: KVSpec,
        device: DeviceTier,
        events: EventLog,
        counters: CacheCounters,
        planner: LoadPlanner,
        *,
        host_bytes: int,
        disk: DiskPlace | None,
        io_threads: int,
        max_host_bytes: int = 0,
        policies: Policies | None = None,
        disk_write_budget: int | None = None,
        scrub_bytes_per_s: float = 0.0,
    ) -> Self:
        """Makes the tiers. A disk folder that cannot be used is logged and counted, and the store goes on without it.

        Args:
            planner: is told how fast loads are.
            host_bytes: size of the host tier; 0 for none.
            disk: folders and size of the disk tier; None for none.
            max_host_bytes: to what `resize` may make the host tier; less than it has now for no more than that.
            policies: of eviction and admission; None: leaf-first LRU, and everything is admitted.
            disk_write_budget: bytes that may be written to the disk tier in a day; None: no limit.
            scrub_bytes_per_s: how fast the disk tier is checked while nobody else uses it; 0: not at all.

        Raises:
            CacheConfigError: a size does not hold one block, or the write budget lets none be written.
            CacheMemoryError: the index of so large a disk tier does not fit into memory.
            dynamo.tiers.errors.TierError: host memory does not suffice.
        """
        slot_bytes = spec.layout.slot_bytes
        if 0 < host_bytes < slot_bytes:
            raise CacheConfigError(
                f"a host tier of {format_size(host_bytes)} is less than one block of {format_size(slot_bytes)}; "
                "give more, or 0 for none"
            )
        if disk is not None and disk.capacity_bytes < slot_bytes:
            raise CacheConfigError(
                f"a disk tier of {format_size(disk.capacity_bytes)} is less than one block of {format_size(slot_bytes)}; "
                "give more"
            )
        if disk is not None and disk_write_budget is not None:
            check_write_budget(disk_write_budget, slot_bytes)
        if disk is not None:
            check_index_fits(disk.capacity_bytes // slot_bytes)
        with ExitStack() as undo:
            disk_tier, disk_fault = _open_disk(spec, disk, io_threads, disk_write_budget) if disk else (None, None)
            if disk_tier is not None:
                undo.callback(disk_tier.close)
            _warn_of_tight_memory(device, host_bytes)
            num_host_slots = host_bytes // slot_bytes
            num_staging = _part_blocks(slot_bytes) * (1 if num_host_slots else _STAGING_PARTS)
            max_slots = max_host_bytes // slot_bytes if max_host_bytes > host_bytes > 0 else None
            arena = HostTier(
                spec.layout,
                num_host_slots,
                num_staging=num_staging,
                max_slots=max_slots,
                gpu=pci_address(device.device),
            )
            undo.callback(arena.close)
            store = cls(
                device,
                arena,
                num_host_slots,
                disk_tier,
                events,
                counters,
                planner,
                disk_fault=disk_fault,
                policies=policies,
                scrub_bytes_per_s=scrub_bytes_per_s,
            )
            undo.pop_all()
        return store

    @property
    def num_pending_blocks(self) -> int:
        """Offered blocks that lie in device memory only."""
        return self._offloader.num_pending_blocks

    @property
    def num_writing_blocks(self) -> int:
        """Blocks on their way from host memory to disk."""
        return self._offloader.num_writing_blocks

    @property
    def num_loads(self) -> int:
        """Loads that have not ended, queued or running."""
        return self._onboarder.num_unfinished

    @property
    def write_tightness(self) -> float:
        """How much of what may be written to disk at once is used up: 0, nothing, or no limit at all, to 1, everything."""
        budget = self._disk.write_budget if self._disk else None
        return 0.0 if budget is None else 1.0 - min(1.0, budget.available_bytes / budget.burst_bytes)

    @property
    def write_budget_stats(self) -> WriteBudgetStats | None:
        """What was written to disk against its budget; None where there is no limit."""
        return self._disk.budget_stats() if self._disk else None

    def count_loadable(self, keys: Sequence[BlockKey], num_known: int = 0) -> int:
        """How many of `keys`, from the first on, lie in host or disk; the first `num_known` are not looked up."""
        return self._shelf.count_loadable(keys, num_known)

    def find_runs(self, keys: Sequence[BlockKey]) -> list[TierRun]:
        """Where `keys` lie, from the first on and as far as host or disk hold them."""
        return self._shelf.find_runs(keys)

    def count_prefix(self, keys: Sequence[BlockKey]) -> tuple[int, int]:
        """How many of `keys`, from the first on, lie in host and in disk."""
        return self._shelf.count_prefix(keys)

    def load(self, request: LoadRequest, timeout_s: float) -> Load:
        """Starts loading blocks into device slots that the caller holds until the transfer has ended."""
        return self._onboarder.load(request, timeout_s)

    def begin_layerwise(self, load: Load) -> LayerLoad:
        """Goes on with a load layer by layer; see `Onboarder.begin_layerwise`."""
        return self._onboarder.begin_layerwise(load)

    def save(self, request: SaveRequest, timeout_s: float) -> bool:
        """Offers blocks; waits while too many are pending, at most `timeout_s`. Returns whether the offer was taken."""
        return self._offloader.save(request, timeout_s)

    def begin_layers(self, request: SaveRequest) -> LayerSave | None:
        """Prepares to save blocks layer by layer; see `Offloader.begin_layers`."""
        return self._offloader.begin_layers(request)

    def save_layer(self, layers: LayerSave, layer: int, fences: list[Fence]) -> None:
        """Copies a layer that is computed. Does not wait."""
        self._offloader.save_layer(layers, layer, fences)

    def abandon(self, layers: LayerSave) -> None:
        """Ends what `begin_layers` began, when it does not come to a commit."""
        self._offloader.abandon(layers)

    def touch(self, chain: list[BlockKey], use: OpenUse | None = None) -> None:
        """Says that a sequence uses these blocks, or has. Takes effect a little later."""
        self._offloader.touch(chain, use)

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything offered so far is in its tiers or dropped; False if that took longer than `timeout_s`."""
        return self._offloader.flush(timeout_s)

    def clear(self, tier: str) -> None:
        """Drops every block of "host" or "disk" that is not in use at this moment."""
        self._shelf.clear(tier)

    def pin(self, keys: Sequence[BlockKey], tier: str) -> HeldSlots:
        """Holds what "host" or "disk" has of `keys`, given in chain order, until released."""
        shelf = self._shelf
        pool = shelf.pool(tier)
        with shelf.changed:
            slots = pool.find_any(keys)
            pool.acquire(slots)
            self._num_pinned += len(slots)

        def release() -> None:
            with shelf.changed:
                pool.release(slots)
                self._num_pinned -= len(slots)
                shelf.changed.notify_all()

        return HeldSlots(tier, slots, pool.num_slots, release)

    def verify(self, timeout_s: float) -> Verification:
        """Checks the blocks on disk, for at most `timeout_s`; forgets and counts those that are not right.

        Raises:
            UnsupportedError: there is no disk tier.
        """
        if self._verifier is None:
            raise UnsupportedError("there is no disk tier to verify; give the cache one")
        return self._verifier.run(timeout_s)

    @property
    def scrub_stats(self) -> ScrubStats | None:
        """How far the check of the disk in the background has come; None where there is none."""
        return self._verifier.scrub_stats if self._verifier else None

    def tier_stats(self) -> Iterator[TierStats]:
        """The counters of each tier alone, without a look at its books."""
        if self._shelf.host.num_slots:
            yield self._arena.stats()
        if self._disk:
            yield self._disk.stats()

    def explain(self, key: BlockKey) -> dict[str, BlockPlace | Removal | None]:
        """Where a block lies in host and disk, or why it does not; see `BlockPool.explain`."""
        return self._shelf.explain(key)

    def runs(self) -> dict[str, tuple[list[BlockKey], RunStarts]]:
        """All blocks in host and disk, and where their runs start, as in a `Snapshot`."""
        return self._shelf.runs()

    def resize(self, tier: str, num_bytes: int, timeout_s: float = _RESIZE_TIMEOUT_S) -> int:
        """Gives "host" or "disk" another size while the store is in use; see `TierResizer.resize`."""
        return self._resizer.resize(tier, num_bytes, timeout_s)

    def describe_shortage(self) -> str | None:
        """What the disk lacks for as many blocks as its tier may hold, and the way out; None for nothing."""
        return self._disk.describe_shortage() if self._disk else None

    def usage(self) -> Iterator[TierUsage]:
        """Occupancy and counters of each tier. A disk tier that could not be opened is told with its fault."""
        hits = self._shelf.counters.hits
        with self._shelf.changed:
            if self._shelf.host.num_slots:
                yield tier_usage(self._arena.stats(), self._shelf.host, self._slot_bytes, hits("host"))
            if self._disk:
                usage = tier_usage(self._disk.stats(), self._shelf.disk, self._slot_bytes, hits("disk"))
                path = self._device_path
                yield replace(usage, device_path=path.description if path else None)
        if self._disk_fault:
            nothing = MovedBlocks()
            stats = TierStats("disk", 0, "none", nothing, nothing, {self._disk_fault: 1})
            yield tier_usage(stats, BlockPool(0), self._slot_bytes, 0)

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance."""
        self._shelf.check_invariants()
        self._shelf.check_unpinned(
            lambda: (
                not self._offloader.num_pending_blocks
                and not self._offloader.num_writing_blocks
                and not self._offloader.num_saving_layers
                and not self._onboarder.num_unfinished
                and not self._num_pinned
                and not (self._verifier and self._verifier.num_suspects)
            )
        )

    def close(self, timeout_s: float) -> None:
        """Writes what is pending, then ends threads and tiers. Idempotent.

        All of it together takes no longer than `timeout_s`, and what the disk tier then waits for calls in progress. A
        thread that hangs in a read or write is left behind; the memory it uses stays valid.
        """
        if self._is_closed:
            return
        self._is_closed = True
        deadline = time.monotonic() + timeout_s
        if self._trial:
            self._trial.close(timeout_s)
        if self._verifier:
            self._verifier.close()
        self._offloader.close(timeout_s)
        self._mover.close(max(0.0, deadline - time.monotonic()))
        if self._disk:
            self._disk.close()
        if self._device_path and self._device_path.staging:
            self._device_path.staging.close()
        self._arena.close()


def _open_disk(
    spec: KVSpec, place: DiskPlace, io_threads: int, write_budget: int | None
) -> tuple[DiskTier | None, str | None]:
    """The disk tier, or why there is none."""
    try:
        tier = DiskTier.open(
            place.directories,
            spec.layout,
            place.capacity_bytes,
            spec.fingerprint,
            io_threads=io_threads,
            write_bytes_per_day=write_budget,
        )
    except TierBusyError as error:
        logger.warning("going on without a disk tier: %s", error)
        return None, "busy"
    except TierUnavailableError as error:
        logger.warning("going on without a disk tier: %s", error)
        return None, "unavailable"
    return tier, None


def _warn_of_tight_memory(device: DeviceTier, host_bytes: int) -> None:
    """Without a GPU both tiers lie in the same memory, which the device tier takes only as it fills."""
    device_bytes, available_bytes = device.num_slots * device.layout.slot_bytes, available_memory_bytes()
    if device.device.type != "cpu" or available_bytes is None or host_bytes > available_bytes:  # refused in a moment
        return
    if device_bytes + host_bytes > available_bytes:
        logger.warning(
            "a device tier of %s and a host tier of %s are more together than the %s of memory that are available: the system "
            "may end this process when both have filled; make one smaller, or free memory",
            format_size(device_bytes),
            format_size(host_bytes),
            format_size(available_bytes),
        )


def _part_blocks(slot_bytes: int) -> int:
    return max(1, _PART_BYTES // slot_bytes)
