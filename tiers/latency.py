"""How long things took, in fixed buckets: bounded in memory, added in a fraction of a microsecond, summed by Prometheus."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

__all__ = ["LATENCY_BOUNDS_S", "LatencyCounts", "LatencyHistogram"]

LATENCY_BOUNDS_S: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0),
)
"""Inclusive upper bounds in seconds: from a copy within memory to the longest wait for a load."""


@dataclass(frozen=True, slots=True)
class LatencyCounts:
    """A histogram at one moment.

    Attributes:
        counts: observations up to each of `LATENCY_BOUNDS_S` and above the one before it; the last one is of those above
            all bounds. Empty: nothing was observed yet.
        sum_s: all observations added up.
    """

    counts: tuple[int, ...] = ()
    sum_s: float = 0.0

    @property
    def num(self) -> int:
        """Observations."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """For each bound, infinity last, how many observations were not above it."""
        counts = self.counts or (0,) * (len(LATENCY_BOUNDS_S) + 1)
        return list(zip((*LATENCY_BOUNDS_S, math.inf), accumulate(counts), strict=True))


class LatencyHistogram:
    """Counts observations. Not thread-safe: its owner holds a lock."""

    __slots__ = ("_counts", "_sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Counts one observation."""
        self._counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self._sum_s += seconds

    def snapshot(self) -> LatencyCounts:
        """The counts as they are now."""
        return LatencyCounts(tuple(self._counts), self._sum_s)
