"""What the cache holds and did, as a snapshot and as the counters behind it."""

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dynamo.kvcache.errors import CacheConfigError
from dynamo.kvcache.planner import PlannerStats
from dynamo.kvcache.pool import BlockPool
from dynamo.kvcache.window import WindowStats
from dynamo.tiers.latency import LatencyCounts, LatencyHistogram
from dynamo.tiers.scrub import ScrubStats
from dynamo.tiers.stats import MovedBlocks, TierStats
from dynamo.tiers.write_budget import WriteBudgetStats

__all__ = [
    "CacheCounters",
    "CacheStats",
    "CountedBlocks",
    "DropReason",
    "LatencyCounts",
    "LoadFault",
    "ScrubStats",
    "TierUsage",
    "WriteBudgetStats",
    "tier_usage",
]

LoadFault = Literal["late", "corrupt", "unreadable", "missing"]
DropReason = Literal[
    "closing",
    "disk_queue_full",
    "disk_write_failed",
    "no_disk_slot",
    "no_host_row",
    "not_admitted",
    "offload_error",
    "offload_queue_full",
    "write_budget",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUsage:
    """One tier at one moment; counters are since the cache was made.

    Attributes:
        tier: "device", "host" or "disk".
        path: how its bytes move: "pinned", "pageable", "O_DIRECT", "buffered" and the like.
        num_slots: blocks it has room for.
        num_cached_blocks: blocks that can be found by key.
        num_pinned_blocks: slots that somebody holds.
        num_idle_blocks: cached blocks that nobody holds, and that make way when room is needed.
        hit_blocks: blocks that sequences got from this tier: found there by `open` (device), or loaded from it.
        evicted_blocks: blocks given up for others.
        read: blocks, bytes and seconds read from the tier.
        write: blocks, bytes and seconds written to it.
        faults: number of faults by kind.
        read_latency: of the calls that read some blocks each.
        write_latency: of the calls that wrote some blocks each.
        device_path: how its blocks get to device memory and back, and why that way; None where there is but one.
    """

    tier: str
    path: str
    num_slots: int
    slot_bytes: int
    num_cached_blocks: int
    num_pinned_blocks: int
    num_idle_blocks: int
    hit_blocks: int
    evicted_blocks: int
    read: MovedBlocks
    write: MovedBlocks
    faults: Mapping[str, int]
    read_latency: LatencyCounts = field(default_factory=LatencyCounts)
    write_latency: LatencyCounts = field(default_factory=LatencyCounts)
    device_path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """The whole cache at one moment; counters are since it was made.

    Attributes:
        tiers: device first.
        num_open_sequences: sequences not yet closed.
        requested_blocks: full blocks asked for by `open`.
        missed_blocks: those that no tier held.
        load_faults: blocks that a tier held and that were computed all the same, by reason: "late", "corrupt", "unreadable"
            and "missing".
        dropped_blocks: offered blocks that did not reach a tier, by reason.
        num_pending_offload_blocks: offered blocks that still lie in device memory only.
        num_pending_disk_blocks: blocks on their way from host memory to disk.
        planner: how it was decided between loading and computing.
        num_loads: loads of sequences that have not ended, queued or running.
        num_pins: active pins.
        verify_faults: blocks on disk that `verify`, or the check in the background, found bad and forgot, by reason:
            "corrupt" and "unreadable".
        load_latency: from `open` to the end of a sequence's loads, by the lowest tier they came from.
        window: the last finished sequences that `open` made.
        scrub: how far the check of the disk tier in the background has come; None where there is none.
        write_budget: what may be, and was, written to the disk tier, and what was refused; None where there is no limit.
    """

    tiers: tuple[TierUsage, ...]
    num_open_sequences: int
    requested_blocks: int
    missed_blocks: int
    load_faults: Mapping[str, int]
    dropped_blocks: Mapping[str, int]
    num_pending_offload_blocks: int
    num_pending_disk_blocks: int
    planner: PlannerStats
    num_loads: int
    num_pins: int
    verify_faults: Mapping[str, int]
    load_latency: Mapping[str, LatencyCounts]
    window: WindowStats
    scrub: ScrubStats | None = None
    write_budget: WriteBudgetStats | None = None

    def tier(self, name: str) -> TierUsage:
        """The tier of that name.

        Raises:
            CacheConfigError: the cache has none.
        """
        for usage in self.tiers:
            if usage.tier == name:
                return usage
        raise CacheConfigError(
            f"the cache has no {name!r} tier; it has {', '.join(usage.tier for usage in self.tiers)}"
        )


def tier_usage(stats: TierStats, pool: BlockPool, slot_bytes: int, hit_blocks: int) -> TierUsage:
    """Puts a tier's own counters and its pool's books together."""
    return TierUsage(
        tier=stats.name,
        path=stats.path,
        num_slots=pool.num_slots,
        slot_bytes=slot_bytes,
        num_cached_blocks=len(pool),
        num_pinned_blocks=pool.num_pinned,
        num_idle_blocks=pool.num_available - pool.num_free,
        hit_blocks=hit_blocks,
        evicted_blocks=pool.num_evicted,
        read=stats.read,
        write=stats.write,
        faults=stats.faults,
        read_latency=stats.read_latency,
        write_latency=stats.write_latency,
    )


@dataclass(frozen=True, slots=True)
class CountedBlocks:
    """See the attributes of `CacheStats` of the same names."""

    requested_blocks: int
    missed_blocks: int
    load_faults: Mapping[str, int]
    dropped_blocks: Mapping[str, int]
    verify_faults: Mapping[str, int]
    load_latency: Mapping[str, LatencyCounts]


class CacheCounters:
    """Thread-safe counters of one cache, in blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._verify_faults: Counter[str] = Counter()
        self._load_latency: dict[str, LatencyHistogram] = {}

    def count_request(self, num_requested: int, num_missed: int) -> None:
        """Counts full blocks asked for by `open`, and those of them that no tier held."""
        with self._lock:
            self._requested["all"] += num_requested
            self._requested["missed"] += num_missed

    def count_hits(self, tier: str, num_blocks: int) -> None:
        """Counts blocks that `tier` gave to a sequence."""
        with self._lock:
            self._hits[tier] += num_blocks

    def count_fault(self, reason: LoadFault, num_blocks: int) -> None:
        """Counts blocks that a tier held and that were computed all the same."""
        if num_blocks:
            with self._lock:
                self._faults[reason] += num_blocks

    def count_dropped(self, reason: DropReason, num_blocks: int) -> None:
        """Counts offered blocks that did not reach a tier."""
        if num_blocks:
            with self._lock:
                self._dropped[reason] += num_blocks

    def count_verified_bad(self, num_corrupt: int, num_unreadable: int) -> None:
        """Counts blocks on disk that a check found bad."""
        with self._lock:
            self._verify_faults.update({"corrupt": num_corrupt, "unreadable": num_unreadable})

    def count_load(self, tier: str, seconds: float) -> None:
        """Counts the loads of one sequence, of which the lowest tier was `tier`, when they have ended."""
        with self._lock:
            self._load_latency.setdefault(tier, LatencyHistogram()).add(seconds)

    def hits(self, tier: str) -> int:
        """Blocks that `tier` gave to sequences."""
        with self._lock:
            return self._hits[tier]

    def snapshot(self) -> CountedBlocks:
        """All but the hits."""
        with self._lock:
            return CountedBlocks(
                self._requested["all"],
                self._requested["missed"],
                dict(self._faults),
                dict(self._dropped),
                {reason: count for reason, count in self._verify_faults.items() if count},
                {tier: histogram.snapshot() for tier, histogram in self._load_latency.items()},
            )
