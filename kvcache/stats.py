"""What the cache holds and did, as a snapshot and as the counters behind it."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from dynamo.tiers.stats import MovedBlocks

__all__ = ["CacheStats", "StoreCounters", "TierUsage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUsage:
    """One tier at one moment; counters are since the cache was made.

    Attributes:
        tier: "device", "host" or "disk".
        path: how its bytes move: "pinned", "pageable", "O_DIRECT", "buffered" and the like.
        num_slots: blocks it has room for.
        num_cached_blocks: blocks that can be found by key.
        num_pinned_blocks: slots that somebody holds.
        hit_blocks: blocks found in this tier, first, by `open`.
        evicted_blocks: blocks given up for others.
        read: blocks, bytes and seconds read from the tier.
        write: blocks, bytes and seconds written to it.
        faults: number of faults by kind.
    """

    tier: str
    path: str
    num_slots: int
    slot_bytes: int
    num_cached_blocks: int
    num_pinned_blocks: int
    hit_blocks: int
    evicted_blocks: int
    read: MovedBlocks
    write: MovedBlocks
    faults: Mapping[str, int]


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
    """

    tiers: tuple[TierUsage, ...]
    num_open_sequences: int
    requested_blocks: int
    missed_blocks: int
    load_faults: Mapping[str, int]
    dropped_blocks: Mapping[str, int]
    num_pending_offload_blocks: int
    num_pending_disk_blocks: int

    def tier(self, name: str) -> TierUsage:
        """The tier of that name; KeyError if the cache has none."""
        for usage in self.tiers:
            if usage.tier == name:
                return usage
        raise KeyError(name)


class StoreCounters:
    """Thread-safe counters of the block store, by reason."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: dict[str, int] = {}
        self._dropped: dict[str, int] = {}
        self._loaded: dict[str, int] = {}

    def count_fault(self, reason: str, num_blocks: int) -> None:
        self._add(self._faults, reason, num_blocks)

    def count_dropped(self, reason: str, num_blocks: int) -> None:
        self._add(self._dropped, reason, num_blocks)

    def count_loaded(self, tier: str, num_blocks: int) -> None:
        self._add(self._loaded, tier, num_blocks)

    @property
    def faults(self) -> dict[str, int]:
        with self._lock:
            return dict(self._faults)

    @property
    def dropped(self) -> dict[str, int]:
        with self._lock:
            return dict(self._dropped)

    def loaded(self, tier: str) -> int:
        """Blocks brought from `tier` to the device."""
        with self._lock:
            return self._loaded.get(tier, 0)

    def _add(self, counts: dict[str, int], reason: str, num_blocks: int) -> None:
        if num_blocks:
            with self._lock:
                counts[reason] = counts.get(reason, 0) + num_blocks
