"""What the router did, in numbers."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dynamo.router.decision import Decision
from dynamo.router.index_stats import IndexStats

__all__ = ["OVERHEAD_BOUNDS_S", "Distribution", "RouterMeter", "RouterStats", "WorkerStats"]

OVERHEAD_BOUNDS_S: Final = (10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Elapsed times.

    Attributes:
        counts: of times up to each of OVERHEAD_BOUNDS_S and above the one before it, and of those above all.
        total_s: their sum.
    """

    counts: tuple[int, ...]
    total_s: float

    @property
    def count(self) -> int:
        """How many."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """One worker as the router sees it.

    Attributes:
        num_requests: booked and reported beyond.
        num_foreign: those of other fronts.
        prefill_tokens: to be computed for them.
        held_blocks: that they hold on the device.
        queue_s: expected wait of a new request.
        report_age_s: since it last reported; None before the first report.
        num_chosen: requests sent there since it joined.
    """

    worker_id: str
    num_requests: int
    num_foreign: int
    prefill_tokens: int
    held_blocks: int
    queue_s: float
    report_age_s: float | None
    is_draining: bool
    is_set_aside: bool
    is_busy: bool
    num_chosen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    """Counts since the start, and what is there now.

    Attributes:
        decisions: by mode and reason.
        failures: of routing, by the error's class.
        hash_s: time of hashing tokens, of each decision; likewise the look-up, the choice and all together.
        prompt_tokens: of all routed requests.
        predicted_cached_tokens: of these, expected to be found at the worker.
        best_cached_tokens: of these, what the worker with the longest prefix would have had.
        reported_tokens: prompt tokens of requests whose worker said how much it found.
        actual_cached_tokens: of these, found.
        reported_predicted_tokens: of these, expected to be found.
        num_set_aside: failures of workers that set them aside.
        num_expired: bookings released because nothing was heard of them.
        num_bookings: under way.
        num_sessions: remembered.
        index: of the index.
        workers: all members.
    """

    decisions: Mapping[tuple[str, str], int]
    failures: Mapping[str, int]
    hash_s: Distribution
    lookup_s: Distribution
    choice_s: Distribution
    total_s: Distribution
    prompt_tokens: int
    predicted_cached_tokens: int
    best_cached_tokens: int
    reported_tokens: int
    actual_cached_tokens: int
    reported_predicted_tokens: int
    num_set_aside: int
    num_expired: int
    num_bookings: int
    num_sessions: int
    index: IndexStats
    workers: tuple[WorkerStats, ...]


class _Times:
    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(OVERHEAD_BOUNDS_S) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(OVERHEAD_BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def distribution(self) -> Distribution:
        return Distribution(tuple(self.counts), self.total_s)


class RouterMeter:
    """Counts decisions. Not thread-safe: it belongs to its Router."""

    def __init__(self) -> None:
        self.decisions: Counter[tuple[str, str]] = Counter()
        self.failures: Counter[str] = Counter()
        self.hash_s, self.lookup_s, self.choice_s, self.total_s = _Times(), _Times(), _Times(), _Times()
        self.prompt_tokens = self.predicted_cached_tokens = self.best_cached_tokens = 0
        self.reported_tokens = self.actual_cached_tokens = self.reported_predicted_tokens = 0
        self.num_set_aside = self.num_expired = 0

    def decided(self, decision: Decision) -> None:
        """A request was sent somewhere."""
        self.decisions[decision.mode, decision.reason] += 1
        self.prompt_tokens += decision.num_tokens
        self.predicted_cached_tokens += decision.chosen.cached_tokens
        self.best_cached_tokens += decision.best_cached_tokens
        overhead = decision.overhead
        self.hash_s.add(overhead.hash_s)
        self.lookup_s.add(overhead.lookup_s)
        self.choice_s.add(overhead.choice_s)
        self.total_s.add(overhead.total_s)

    def found(self, num_tokens: int, predicted_tokens: int, actual_tokens: int) -> None:
        """A worker said how much of a prompt it had."""
        self.reported_tokens += num_tokens
        self.reported_predicted_tokens += predicted_tokens
        self.actual_cached_tokens += actual_tokens

    def stats(
        self, *, num_bookings: int, num_sessions: int, index: IndexStats, workers: tuple[WorkerStats, ...]
    ) -> RouterStats:
        """The counts, with what only the router itself knows."""
        return RouterStats(
            decisions=dict(self.decisions),
            failures=dict(self.failures),
            hash_s=self.hash_s.distribution(),
            lookup_s=self.lookup_s.distribution(),
            choice_s=self.choice_s.distribution(),
            total_s=self.total_s.distribution(),
            prompt_tokens=self.prompt_tokens,
            predicted_cached_tokens=self.predicted_cached_tokens,
            best_cached_tokens=self.best_cached_tokens,
            reported_tokens=self.reported_tokens,
            actual_cached_tokens=self.actual_cached_tokens,
            reported_predicted_tokens=self.reported_predicted_tokens,
            num_set_aside=self.num_set_aside,
            num_expired=self.num_expired,
            num_bookings=num_bookings,
            num_sessions=num_sessions,
            index=index,
            workers=workers,
        )
