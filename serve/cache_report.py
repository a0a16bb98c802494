"""A line in the log, now and then, of what the cache did for the last requests; none while nothing happens."""

import asyncio
import logging
from collections.abc import Callable

from dynamo.kvcache.stats import CacheStats

__all__ = ["REPORT_INTERVAL_S", "describe_cache", "report_cache"]

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 60.0


def describe_cache(stats: CacheStats) -> str:
    """The window in one line, such as "last 1000 requests: 81.3 % of 402113 prompt tokens cached (device 60.2 %, ...)"."""
    window = stats.window
    shares = ", ".join(f"{tier.tier} {_percent(tier.prompt_share)}" for tier in window.tiers)
    filled = ", ".join(
        f"{tier.tier} {_percent(tier.num_cached_blocks / tier.num_slots if tier.num_slots else None)}"
        for tier in stats.tiers
    )
    parts = [
        f"last {window.num_requests} requests: {_percent(window.hit_rate)} of {window.prompt_tokens} prompt tokens "
        f"cached ({shares})",
        f"full: {filled}",
    ]
    for text, counts in (("not loaded", stats.load_faults), ("not kept", stats.dropped_blocks)):
        if counts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            parts.append(f"blocks {text} since the start: {reasons}")
    return "; ".join(parts)


async def report_cache(stats: Callable[[], CacheStats], interval_s: float = REPORT_INTERVAL_S) -> None:
    """Logs the line every `interval_s` in which a request finished, until cancelled."""
    num_finished = 0
    while True:
        await asyncio.sleep(interval_s)
        snapshot = await asyncio.to_thread(stats)
        if snapshot.window.num_finished != num_finished:
            num_finished = snapshot.window.num_finished
            logger.info("%s", describe_cache(snapshot))


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"
