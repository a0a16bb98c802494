"""Answers to an operator's questions: how full the tiers are, who holds what, what is on its way, what a check found.

This module loads no torch, so that a server can describe its endpoints before it loads a model.
"""

from dataclasses import dataclass

from dynamo.kvcache.leases import PinInfo
from dynamo.kvcache.stats import CacheStats
from dynamo.kvcache.window import WindowStats

__all__ = ["CacheStatus", "Residency", "TierStatus", "Verification", "cache_status"]


@dataclass(frozen=True, slots=True)
class Residency:
    """How many leading tokens lie in each tier, and in all of them together. Whole blocks only."""

    device_tokens: int
    host_tokens: int
    disk_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a check of the disk tier found.

    Attributes:
        num_blocks: blocks on disk when it began.
        num_checked: blocks that were read and compared.
        num_gone: blocks that had made way for others before they were read.
        num_corrupt: blocks whose bytes were others; they are forgotten and will be computed again.
        num_unreadable: blocks that could not be read; likewise.
        seconds: how long it took.
        is_complete: whether it came to the end within its time.
    """

    num_blocks: int
    num_checked: int
    num_gone: int
    num_corrupt: int
    num_unreadable: int
    seconds: float
    is_complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStatus:
    """One tier now.

    Attributes:
        tier: "device", "host" or "disk".
        path: how its bytes move: "pinned", "pageable", "O_DIRECT", "buffered" and the like.
        num_slots: blocks it has room for.
        num_cached_blocks: blocks that can be found by content.
        num_pinned_blocks: slots that somebody holds: sequences, transfers and pins.
        num_idle_blocks: cached blocks that nobody holds, and that make way when room is needed.
        num_bytes: of all slots.
        num_cached_bytes: of the slots of cached blocks.
    """

    tier: str
    path: str
    num_slots: int
    num_cached_blocks: int
    num_pinned_blocks: int
    num_idle_blocks: int
    num_bytes: int
    num_cached_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatus:
    """The cache now.

    Attributes:
        tiers: device first.
        num_open_sequences: sequences not yet closed.
        num_loads: loads of sequences that have not ended, queued or running.
        num_pending_offload_blocks: offered blocks that still lie in device memory only.
        num_pending_disk_blocks: blocks on their way from host memory to disk.
        pins: active pins, oldest first.
        window: what the last finished requests got from which tier.
    """

    tiers: tuple[TierStatus, ...]
    num_open_sequences: int
    num_loads: int
    num_pending_offload_blocks: int
    num_pending_disk_blocks: int
    pins: tuple[PinInfo, ...]
    window: WindowStats


def cache_status(stats: CacheStats, pins: tuple[PinInfo, ...]) -> CacheStatus:
    """The part of a snapshot that says how things are, without what was counted since the start."""
    return CacheStatus(
        tiers=tuple(
            TierStatus(
                tier=usage.tier,
                path=usage.path,
                num_slots=usage.num_slots,
                num_cached_blocks=usage.num_cached_blocks,
                num_pinned_blocks=usage.num_pinned_blocks,
                num_idle_blocks=usage.num_idle_blocks,
                num_bytes=usage.num_slots * usage.slot_bytes,
                num_cached_bytes=usage.num_cached_blocks * usage.slot_bytes,
            )
            for usage in stats.tiers
        ),
        num_open_sequences=stats.num_open_sequences,
        num_loads=stats.num_loads,
        num_pending_offload_blocks=stats.num_pending_offload_blocks,
        num_pending_disk_blocks=stats.num_pending_disk_blocks,
        pins=pins,
        window=stats.window,
    )
