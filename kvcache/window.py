"""What the last requests got from the cache: a sliding window over finished sequences, tier by tier.

Hit rates need the right denominator. A lower tier is asked only for what the tiers above lack, so beside the share of all
prompt tokens, which adds up over the tiers, a lower tier's own rate is over the prompt tokens that device memory did not
hold. A request whose prompt lay there in full says nothing about the tiers below and adds nothing to their rate.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynamo.tiers.stats import MovedBlocks, TierStats

__all__ = ["DEFAULT_WINDOW_REQUESTS", "RequestHits", "RequestWindow", "WindowStats", "WindowTier"]

DEFAULT_WINDOW_REQUESTS = 1000
_NUM_MARKS = 16  # what the tiers have moved is noted so many times per window


class RequestHits(NamedTuple):
    """One request, in tokens. A tuple, since a thousand of them become an array at once.

    Attributes:
        prompt: all of the prompt.
        cacheable: those that could have come from the cache.
        device, host, disk: those that came from there.
    """

    prompt: int
    cacheable: int
    device: int
    host: int
    disk: int


_TIERS = ("device", "host", "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowTier:
    """One tier in the window.

    Attributes:
        asked_tokens: prompt tokens in whole blocks that the tier was asked for: all that may come from the cache for the
            device, and for the tiers below those that the device did not hold.
        hit_tokens: those of them that requests got from this tier.
        hit_rate: hit tokens over asked ones; None when the tier was not asked for any.
        prompt_share: hit tokens over all prompt tokens of the window; None without any.
        read: what was read from the tier since about the window's oldest request.
        write: what was written to it, likewise.
    """

    tier: str
    asked_tokens: int
    hit_tokens: int
    hit_rate: float | None
    prompt_share: float | None
    read: MovedBlocks
    write: MovedBlocks


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStats:
    """The last requests.

    Attributes:
        num_requests: requests in the window; at most its size.
        num_finished: requests finished since the cache was made.
        span_s: since about the oldest request in the window; what `read` and `write` of the tiers cover.
        prompt_tokens: of all requests in the window.
        cached_tokens: those of them that were not computed.
        hit_rate: cached over prompt tokens; None without requests.
        tiers: device, host and disk, as far as the cache has them.
    """

    num_requests: int
    num_finished: int
    span_s: float
    prompt_tokens: int
    cached_tokens: int
    hit_rate: float | None
    tiers: tuple[WindowTier, ...]


@dataclass(frozen=True, slots=True)
class _Mark:
    """What the tiers had moved when `num_finished` requests had finished."""

    num_finished: int
    time_s: float
    moved: dict[str, tuple[MovedBlocks, MovedBlocks]]


class RequestWindow:
    """The last `num_requests` finished requests. Thread-safe. Adding one costs about a microsecond.

    Args:
        tiers: gives the counters of the tiers there are; called without a lock, by whoever adds a request or asks.
    """

    def __init__(self, tiers: Callable[[], Iterable[TierStats]], num_requests: int = DEFAULT_WINDOW_REQUESTS) -> None:
        self._tiers = tiers
        self._lock = threading.Lock()  # guards all below
        self._requests: deque[RequestHits] = deque(maxlen=num_requests)
        self._num_finished = 0
        self._mark_every = max(1, num_requests // _NUM_MARKS)
        self._marks: deque[_Mark] = deque([self._mark(0)], maxlen=-(-num_requests // self._mark_every) + 1)

    def add(self, hits: RequestHits) -> None:
        """Counts a finished request."""
        with self._lock:
            self._requests.append(hits)
            self._num_finished += 1
            num_finished = self._num_finished
        if num_finished % self._mark_every == 0:
            mark = self._mark(num_finished)
            with self._lock:
                self._marks.append(mark)

    def snapshot(self) -> WindowStats:
        """The window now."""
        now = self._mark(0)
        with self._lock:
            requests = np.array(self._requests, dtype=np.int64).reshape(-1, 5)
            num_finished = self._num_finished
            oldest = num_finished - len(requests)
            mark = next((mark for mark in reversed(self._marks) if mark.num_finished <= oldest), self._marks[0])
        prompt, cacheable, *hits = requests.sum(axis=0).tolist()
        tiers = []
        for tier, hit in zip(_TIERS, hits, strict=True):
            if tier not in now.moved:
                continue
            read, write = now.moved[tier]
            read_before, write_before = mark.moved.get(tier, (MovedBlocks(), MovedBlocks()))
            asked = cacheable if tier == "device" else cacheable - hits[0]
            tiers.append(
                WindowTier(
                    tier=tier,
                    asked_tokens=asked,
                    hit_tokens=hit,
                    hit_rate=_share(hit, asked),
                    prompt_share=_share(hit, prompt),
                    read=read.since(read_before),
                    write=write.since(write_before),
                )
            )
        return WindowStats(
            num_requests=len(requests),
            num_finished=num_finished,
            span_s=now.time_s - mark.time_s,
            prompt_tokens=prompt,
            cached_tokens=sum(hits),
            hit_rate=_share(sum(hits), prompt),
            tiers=tuple(tiers),
        )

    def _mark(self, num_finished: int) -> _Mark:
        moved = {stats.name: (stats.read, stats.write) for stats in self._tiers()}
        return _Mark(num_finished, time.monotonic(), moved)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
