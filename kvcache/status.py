"""Answers to an operator's questions: how full the tiers are, who holds what, what is on its way, what a check found.

This module loads no torch, so that a server can describe its endpoints before it loads a model.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.leases import PinInfo
from dynamo.kvcache.pool import BlockPlace
from dynamo.kvcache.removals import Removal
from dynamo.kvcache.stats import CacheStats
from dynamo.kvcache.window import WindowStats
from dynamo.tiers.scrub import ScrubStats
from dynamo.tiers.write_budget import WriteBudgetStats

__all__ = [
    "BlockStatus",
    "CacheStatus",
    "Residency",
    "ScrubStatus",
    "TierBlock",
    "TierStatus",
    "Verification",
    "block_status",
    "cache_status",
]


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
        device_path: how its blocks get to device memory and back, and why that way; None where there is but one.
        num_slots: blocks it has room for.
        num_cached_blocks: blocks that can be found by content.
        num_pinned_blocks: slots that somebody holds: sequences, transfers and pins.
        num_idle_blocks: cached blocks that nobody holds, and that make way when room is needed.
        num_bytes: of all slots.
        num_cached_bytes: of the slots of cached blocks.
    """

    tier: str
    path: str
    device_path: str | None
    num_slots: int
    num_cached_blocks: int
    num_pinned_blocks: int
    num_idle_blocks: int
    num_bytes: int
    num_cached_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubStatus:
    """How far the check of the disk tier in the background has come. What it found bad is in the statistics.

    Attributes:
        num_checked: blocks read and compared since the cache was made.
        num_rounds: how often it came to the end of the tier.
        round_share: how much of the tier the present round has seen, from 0 to 1.
        last_round_s: how long ago the last round ended; None before.
    """

    num_checked: int
    num_rounds: int
    round_share: float
    last_round_s: float | None


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
        scrub: the check of the disk tier in the background; None where there is none.
        write_budget: what may be, and was, written to the disk tier, and what was refused; None where there is no limit.
    """

    tiers: tuple[TierStatus, ...]
    num_open_sequences: int
    num_loads: int
    num_pending_offload_blocks: int
    num_pending_disk_blocks: int
    pins: tuple[PinInfo, ...]
    window: WindowStats
    scrub: ScrubStatus | None
    write_budget: WriteBudgetStats | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierBlock:
    """One block in one tier, or why it is not there.

    Attributes:
        tier: "device", "host" or "disk".
        state: "held" by somebody; "idle", to be evicted when room is needed; "removed"; or "unknown": never there, as far
            back as the tier remembers.
        num_users: who hold it.
        num_children: blocks in the tier that continue it, and are evicted before it.
        is_orphan: the block before it is not in the tier, so that nobody can get at it there.
        used_s: how long ago its last use began; None unless it is idle.
        turn: how many earlier uses that one continued; None unless it is idle.
        priority: of that use; None unless it is idle.
        removal: why it was removed: "evicted", "cleared", "lost" and the like; None unless it was.
        removed_s: how long ago.
    """

    tier: str
    state: Literal["held", "idle", "removed", "unknown"]
    num_users: int = 0
    num_children: int = 0
    is_orphan: bool = False
    used_s: float | None = None
    turn: int | None = None
    priority: int | None = None
    removal: str | None = None
    removed_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStatus:
    """One block in all tiers.

    Attributes:
        key: 32 hexadecimal digits.
        position: its place in the prompt it was asked for with, counted from 0; None where it was asked for by key.
        tiers: device first.
    """

    key: str
    position: int | None
    tiers: tuple[TierBlock, ...]


def block_status(key: BlockKey, position: int | None, places: Mapping[str, BlockPlace | Removal | None]) -> BlockStatus:
    """What `KVCache.explain` says of a block, in plain values."""
    now = time.monotonic()

    def in_tier(tier: str, place: BlockPlace | Removal | None) -> TierBlock:
        match place:
            case BlockPlace():
                return TierBlock(
                    tier=tier,
                    state="held" if place.num_users else "idle",
                    num_users=place.num_users,
                    num_children=place.num_children,
                    is_orphan=place.is_orphan,
                    used_s=now - use.time_s if (use := place.use) else None,
                    turn=use.turn if use else None,
                    priority=use.priority if use else None,
                )
            case Removal():
                return TierBlock(tier=tier, state="removed", removal=place.reason, removed_s=now - place.time_s)
        return TierBlock(tier=tier, state="unknown")

    return BlockStatus(
        key=key.hex(), position=position, tiers=tuple(in_tier(tier, place) for tier, place in places.items())
    )


def cache_status(stats: CacheStats, pins: tuple[PinInfo, ...]) -> CacheStatus:
    """The part of a snapshot that says how things are, without what was counted since the start."""
    return CacheStatus(
        tiers=tuple(
            TierStatus(
                tier=usage.tier,
                path=usage.path,
                device_path=usage.device_path,
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
        scrub=_scrub_status(stats.scrub) if stats.scrub else None,
        write_budget=stats.write_budget,
    )


def _scrub_status(stats: ScrubStats) -> ScrubStatus:
    ended_s = stats.round_ended_s
    return ScrubStatus(
        num_checked=stats.num_checked,
        num_rounds=stats.num_rounds,
        round_share=stats.round_share,
        last_round_s=None if ended_s is None else time.monotonic() - ended_s,
    )
