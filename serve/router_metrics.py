"""What a front with workers counts: the router's choices, its index and feeds, the waiting room, and workers lost.

Read on the front's event loop when somebody asks, as all of it belongs to that loop.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo.router.stats import OVERHEAD_BOUNDS_S, Distribution, RouterStats, WorkerStats
from dynamo.router.subscriber import SubscriberStats
from dynamo.router.waiting import WaitingStats
from dynamo.serve.fleet import MemberStats
from dynamo.serve.migration import MigrationStats

__all__ = ["RouterCollector"]

T = TypeVar("T")
_Table = tuple[tuple[str, str, Callable[[T], float]], ...]

_ROUTER_COUNTERS: Final[_Table[RouterStats]] = (
    ("prompt_tokens", "Prompt tokens of routed requests.", lambda stats: stats.prompt_tokens),
    (
        "predicted_cached_tokens",
        "Of them, expected at the chosen worker when it was chosen.",
        lambda stats: stats.predicted_cached_tokens,
    ),
    (
        "best_cached_tokens",
        "Of them, held by the worker with the longest prefix, whichever was chosen.",
        lambda stats: stats.best_cached_tokens,
    ),
    ("answered_prompt_tokens", "Prompt tokens of requests that were answered.", lambda stats: stats.reported_tokens),
    (
        "answered_predicted_tokens",
        "Of them, expected to be cached when the worker was chosen.",
        lambda stats: stats.reported_predicted_tokens,
    ),
    ("answered_cached_tokens", "Of them, found in the worker's cache.", lambda stats: stats.actual_cached_tokens),
    ("workers_set_aside", "Times that a worker was set aside for a failure.", lambda stats: stats.num_set_aside),
    (
        "expired_bookings",
        "Requests of which nothing was heard for so long that their load was released.",
        lambda stats: stats.num_expired,
    ),
    (
        "index_evicted_predictions",
        "Predicted blocks forgotten early for want of room.",
        lambda stats: stats.index.num_predictions_evicted,
    ),
    ("index_refused_blocks", "Blocks kept out of a full index.", lambda stats: stats.index.num_refused),
)
_ROUTER_GAUGES: Final[_Table[RouterStats]] = (
    ("bookings", "Requests under way.", lambda stats: stats.num_bookings),
    ("sessions", "Sessions whose worker is remembered.", lambda stats: stats.num_sessions),
    ("index_blocks", "Different blocks in the index.", lambda stats: stats.index.num_blocks),
    ("index_bytes", "Memory of the index.", lambda stats: stats.index.num_bytes),
    ("index_unswept_entries", "Entries of what is gone, not forgotten yet.", lambda stats: stats.index.num_unswept),
    ("index_runs", "Stretches of blocks with the same holders.", lambda stats: stats.index.num_runs),
    ("index_predicted_blocks", "Blocks expected from routed requests.", lambda stats: stats.index.num_predicted),
)
_WORKER_GAUGES: Final[_Table[WorkerStats]] = (
    ("requests", "Requests at the worker, of all fronts.", lambda worker: worker.num_requests),
    ("foreign_requests", "Of them, those of other fronts.", lambda worker: worker.num_foreign),
    ("prefill_tokens", "Prompt tokens it has still to compute.", lambda worker: worker.prefill_tokens),
    ("held_blocks", "Blocks that running requests hold on its device.", lambda worker: worker.held_blocks),
    ("queue_seconds", "Expected wait of a new request.", lambda worker: worker.queue_s),
    ("draining", "1: it takes nothing new.", lambda worker: worker.is_draining),
    ("set_aside", "1: it failed a moment ago, and others are preferred.", lambda worker: worker.is_set_aside),
    ("busy", "1: above the busy thresholds.", lambda worker: worker.is_busy),
)
_FEED_COUNTERS: Final[_Table[SubscriberStats]] = (
    ("batches", "Batches of events applied, heartbeats included.", lambda feed: feed.feed.batches),
    ("events", "Events applied.", lambda feed: feed.feed.events),
    ("gaps", "Times that something was missing.", lambda feed: feed.feed.gaps),
    ("replays", "Replays asked for and ended.", lambda feed: feed.feed.replays),
    ("snapshots", "Snapshots applied.", lambda feed: feed.feed.snapshots),
    ("snapshot_failures", "Snapshots that could not be had.", lambda feed: feed.snapshot_failures),
    ("losses", "Gaps that nothing could fill: the worker's blocks were forgotten.", lambda feed: feed.feed.losses),
    ("restarts", "Restarts of the worker, as seen in its stream.", lambda feed: feed.feed.restarts),
    ("duplicates", "Batches that came again, or too late to matter.", lambda feed: feed.feed.duplicates),
    ("stale", "Batches and snapshots of an incarnation that is over.", lambda feed: feed.feed.stale),
    ("malformed", "Messages that could not be read.", lambda feed: feed.feed.malformed + feed.malformed_messages),
    ("overflows", "Batches dropped as too many were waiting.", lambda feed: feed.feed.overflows),
    ("unknown_removals", "Blocks removed that were not known.", lambda feed: feed.feed.unknown_removals),
    ("unknown_events", "Events of an unknown kind or tier.", lambda feed: feed.feed.unknown_events),
    ("lost_load_messages", "Messages about load that never came.", lambda feed: feed.lost_load_messages),
    ("disconnects", "Times that the connection broke.", lambda feed: feed.disconnects),
)
_FEED_GAUGES: Final[_Table[SubscriberStats]] = (
    ("pending_batches", "Batches that wait for what is missing before them.", lambda feed: feed.feed.num_pending),
    ("in_sync", "1: nothing is missing.", lambda feed: feed.feed.is_in_sync),
    ("connected", "1: there is a connection.", lambda feed: feed.is_connected),
    ("silent", "1: nothing came for longer than it should.", lambda feed: feed.is_silent),
)


class RouterCollector(Collector):
    """Turns the books of a front with workers into metrics.

    Args:
        router: gives `Router.stats`.
        room: gives `WaitingRoom.stats`.
        fleet: gives `Fleet.stats`.
        migrations: of the `RoutedEngine`.
        migration_limit: as configured.
    """

    def __init__(
        self,
        router: Callable[[], RouterStats],
        room: Callable[[], WaitingStats],
        fleet: Callable[[], Sequence[MemberStats]],
        migrations: MigrationStats,
        *,
        migration_limit: int,
    ) -> None:
        self._router = router
        self._room = room
        self._fleet = fleet
        self._migrations = migrations
        self._migration_limit = migration_limit

    def collect(self) -> Iterator[Metric]:
        """All families."""
        stats, members = self._router(), self._fleet()
        yield from _router_families(stats)
        yield from _worker_families(stats, members)
        yield from _feed_families(members)
        yield from _waiting_families(self._room())
        yield from self._migration_families()

    def _migration_families(self) -> Iterator[Metric]:
        stats = self._migrations
        for name, text, counts in (
            ("lost", "Workers lost under a request, before its first token (new) or after (ongoing).", stats.detected),
            ("succeeded", "Requests that went on at another worker.", stats.succeeded),
            ("exhausted", "Requests that failed because their workers were lost.", stats.exhausted),
        ):
            yield _counter(
                f"dynamo_migration_{name}", text, ["phase"], [([phase], counts[phase]) for phase in ("new", "ongoing")]
            )
        yield _counter(
            "dynamo_migration_refused",
            "Requests tried elsewhere because a worker had no room or was about to leave.",
            ["reason"],
            [([reason], stats.refused[reason]) for reason in ("draining", "overloaded")],
        )
        yield GaugeMetricFamily(
            "dynamo_migration_limit", "How many workers a request may lose and still go on.", self._migration_limit
        )
        yield stats.duration.family()


def _router_families(stats: RouterStats) -> Iterator[Metric]:
    yield _counter(
        "dynamo_router_decisions",
        "Requests sent to a worker, by mode and what settled it.",
        ["mode", "reason"],
        [([*labels], count) for labels, count in sorted(stats.decisions.items())],
    )
    yield _counter(
        "dynamo_router_failures",
        "Times that no worker could be had.",
        ["error"],
        [([name], count) for name, count in sorted(stats.failures.items())],
    )
    for name, text, read in _ROUTER_COUNTERS:
        yield CounterMetricFamily(f"dynamo_router_{name}", text, read(stats))
    for name, text, read in _ROUTER_GAUGES:
        yield GaugeMetricFamily(f"dynamo_router_{name}", text, read(stats))
    overhead = HistogramMetricFamily(
        "dynamo_router_overhead_seconds", "How long the router thought about a request.", labels=["part"]
    )
    for part, times in (
        ("hash", stats.hash_s),
        ("lookup", stats.lookup_s),
        ("choice", stats.choice_s),
        ("total", stats.total_s),
    ):
        overhead.add_metric([part], _buckets(times), times.total_s)
    yield overhead


def _worker_families(stats: RouterStats, members: Sequence[MemberStats]) -> Iterator[Metric]:
    workers, index = stats.workers, stats.index
    yield _counter(
        "dynamo_worker_chosen",
        "Requests sent to the worker since it joined.",
        ["worker"],
        [([worker.worker_id], worker.num_chosen) for worker in workers],
    )
    for name, text, read in _WORKER_GAUGES:
        yield _gauge(
            f"dynamo_worker_{name}", text, ["worker"], [([worker.worker_id], read(worker)) for worker in workers]
        )
    yield _gauge(
        "dynamo_worker_report_age_seconds",
        "Since the worker last said how it is.",
        ["worker"],
        [([worker.worker_id], worker.report_age_s) for worker in workers if worker.report_age_s is not None],
    )
    yield _gauge(
        "dynamo_worker_ready",
        "1: the worker takes requests, and its blocks are known.",
        ["worker"],
        [([member.worker_id], member.is_ready) for member in members],
    )
    yield _gauge(
        "dynamo_worker_indexed_blocks",
        "The worker's blocks that the router knows of, by tier.",
        ["worker", "tier"],
        [
            ([worker.worker_id, tier], count)
            for worker in workers
            for tier, count in index.entries.get(worker.slot, {}).items()
        ],
    )
    yield _gauge(
        "dynamo_worker_indexed_bytes",
        "The router's memory for the worker's blocks.",
        ["worker"],
        [([worker.worker_id], index.slot_bytes.get(worker.slot, 0)) for worker in workers],
    )
    yield from _report_families(members)


def _report_families(members: Sequence[MemberStats]) -> Iterator[Metric]:
    """What workers say of themselves."""
    reports = [(member.worker_id, member.report) for member in members if member.report is not None]
    yield _gauge(
        "dynamo_worker_running_sequences",
        "Sequences in the worker's batch.",
        ["worker"],
        [([worker_id], report.num_running) for worker_id, report in reports],
    )
    yield _gauge(
        "dynamo_worker_waiting_sequences",
        "Sequences that wait for the worker's batch.",
        ["worker"],
        [([worker_id], report.num_waiting) for worker_id, report in reports],
    )
    yield _gauge(
        "dynamo_worker_used_blocks",
        "Blocks in use at the worker, by tier.",
        ["worker", "tier"],
        [([worker_id, tier], count) for worker_id, report in reports for tier, count in report.used_blocks.items()],
    )
    yield _gauge(
        "dynamo_worker_prefill_tokens_per_second",
        "How fast the worker computes prompts, as it measured.",
        ["worker"],
        [
            ([worker_id], report.prefill_tokens_per_s)
            for worker_id, report in reports
            if report.prefill_tokens_per_s is not None
        ],
    )
    yield _gauge(
        "dynamo_worker_load_blocks_per_second",
        "How fast the worker gets blocks back from a tier, as it measured.",
        ["worker", "tier"],
        [([worker_id, tier], rate) for worker_id, report in reports for tier, rate in report.load_blocks_per_s.items()],
    )


def _feed_families(members: Sequence[MemberStats]) -> Iterator[Metric]:
    feeds = [(member.worker_id, member.feed) for member in members if member.feed is not None]
    for name, text, read in _FEED_COUNTERS:
        yield _counter(
            f"dynamo_feed_{name}", text, ["worker"], [([worker_id], read(feed)) for worker_id, feed in feeds]
        )
    for name, text, read in _FEED_GAUGES:
        yield _gauge(f"dynamo_feed_{name}", text, ["worker"], [([worker_id], read(feed)) for worker_id, feed in feeds])


def _waiting_families(stats: WaitingStats) -> Iterator[Metric]:
    yield _gauge(
        "dynamo_waiting_room_requests",
        "Requests that wait for a worker with room, by priority.",
        ["priority"],
        [([str(priority)], count) for priority, count in sorted(stats.num_waiting.items())],
    )
    yield _counter(
        "dynamo_waiting_room_outcomes",
        "Requests by what became of them there.",
        ["outcome"],
        [([outcome], count) for outcome, count in sorted(stats.outcomes.items())],
    )
    yield CounterMetricFamily("dynamo_waiting_room_seconds", "Time spent waiting, added up.", stats.waited_s)


def _counter(name: str, text: str, labels: list[str], samples: Iterable[tuple[list[str], float]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _gauge(name: str, text: str, labels: list[str], samples: Iterable[tuple[list[str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, float(value))
    return family


def _buckets(times: Distribution) -> list[tuple[str, float]]:
    total = 0
    buckets = []
    for bound, count in zip((*OVERHEAD_BOUNDS_S, math.inf), times.counts, strict=True):
        total += count
        buckets.append(("+Inf" if math.isinf(bound) else str(bound), float(total)))
    return buckets
