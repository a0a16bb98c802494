"""The cache's own counters, tier by tier, read at scrape time."""

import math
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo.kvcache.planner import PlannerStats
from dynamo.kvcache.stats import CacheStats, LatencyCounts, ScrubStats, TierUsage, WriteBudgetStats
from dynamo.kvcache.window import WindowTier

__all__ = ["CacheCollector"]

_PREFIX = "dynamo_kvcache_"

_GAUGES: tuple[tuple[str, str, Callable[[TierUsage], float]], ...] = (
    ("slots", "Blocks the tier has room for.", lambda tier: tier.num_slots),
    ("cached_blocks", "Blocks that can be found by content.", lambda tier: tier.num_cached_blocks),
    ("pinned_blocks", "Slots that somebody holds.", lambda tier: tier.num_pinned_blocks),
    (
        "idle_blocks",
        "Cached blocks that nobody holds and that make way when room is needed.",
        lambda t: t.num_idle_blocks,
    ),
    ("capacity_bytes", "Bytes of all slots.", lambda tier: tier.num_slots * tier.slot_bytes),
)
_COUNTERS: tuple[tuple[str, str, Callable[[TierUsage], float]], ...] = (
    ("hit_blocks", "Blocks that sequences got from this tier.", lambda tier: tier.hit_blocks),
    ("evicted_blocks", "Blocks given up for others.", lambda tier: tier.evicted_blocks),
    ("read_blocks", "Blocks read from the tier.", lambda tier: tier.read.blocks),
    ("read_bytes", "Bytes read from the tier.", lambda tier: tier.read.bytes),
    ("read_seconds", "Time spent reading, added up over threads.", lambda tier: tier.read.seconds),
    ("read_failed_blocks", "Blocks that could not be read.", lambda tier: tier.read.failed_blocks),
    ("write_blocks", "Blocks written to the tier.", lambda tier: tier.write.blocks),
    ("write_bytes", "Bytes written to the tier.", lambda tier: tier.write.bytes),
    ("write_seconds", "Time spent writing, added up over threads.", lambda tier: tier.write.seconds),
    ("write_failed_blocks", "Blocks that could not be written.", lambda tier: tier.write.failed_blocks),
)

_WINDOW_GAUGES: tuple[tuple[str, str, Callable[[WindowTier], float | None]], ...] = (
    (
        "window_asked_tokens",
        "Prompt tokens the tier was asked for: below the device, what that lacked.",
        lambda t: t.asked_tokens,
    ),
    ("window_hit_tokens", "Prompt tokens that came from the tier.", lambda t: t.hit_tokens),
    ("window_hit_ratio", "Hit tokens over the tokens the tier was asked for.", lambda t: t.hit_rate),
    ("window_prompt_ratio", "Hit tokens over all prompt tokens; adds up over the tiers.", lambda t: t.prompt_share),
    (
        "window_read_bytes_per_second",
        "While reading from the tier, per reading thread.",
        lambda t: _rate(t.read.gb_per_s),
    ),
    (
        "window_write_bytes_per_second",
        "While writing to the tier, per writing thread.",
        lambda t: _rate(t.write.gb_per_s),
    ),
)
_IN_WINDOW = " Of the last finished requests."


class CacheCollector(Collector):
    """Turns a snapshot of the cache into metrics.

    Args:
        stats: gives the snapshot, such as `KVCache.stats`; called from the thread that scrapes.
    """

    def __init__(self, stats: Callable[[], CacheStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """All families of the cache."""
        stats = self._stats()
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=["tier"])
            for tier in stats.tiers:
                gauge.add_metric([tier.tier], read(tier))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(_PREFIX + name, text, labels=["tier"])
            for tier in stats.tiers:
                counter.add_metric([tier.tier], read(tier))
            yield counter
        yield _path_info(stats)
        yield _tier_faults(stats)
        yield _by_reason("load_faults", "Blocks a tier held that had to be computed all the same.", stats.load_faults)
        yield _by_reason("dropped_blocks", "Offered blocks that did not reach a tier.", stats.dropped_blocks)
        yield from _load_decisions(stats.planner)
        yield _by_reason("verify_faults", "Blocks on disk that a check found bad.", stats.verify_faults)
        yield from _scrubbing(stats.scrub)
        yield from _write_budget(stats.write_budget)
        yield from _latencies(stats)
        yield from _window(stats)
        yield CounterMetricFamily(_PREFIX + "requested_blocks", "Full blocks asked for.", stats.requested_blocks)
        yield CounterMetricFamily(_PREFIX + "missed_blocks", "Blocks asked for that no tier held.", stats.missed_blocks)
        for name, text, value in (
            ("open_sequences", "Sequences that hold blocks.", stats.num_open_sequences),
            ("loads", "Loads of sequences that have not ended, queued or running.", stats.num_loads),
            ("pins", "Active pins.", stats.num_pins),
            ("pending_offload_blocks", "Offered blocks still in device memory only.", stats.num_pending_offload_blocks),
            ("pending_disk_blocks", "Blocks on their way from host memory to disk.", stats.num_pending_disk_blocks),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value)


def _scrubbing(scrub: ScrubStats | None) -> Iterator[Metric]:
    if scrub is None:
        return
    yield CounterMetricFamily(
        _PREFIX + "scrub_checked_blocks", "Blocks on disk checked in the background.", scrub.num_checked
    )
    yield CounterMetricFamily(
        _PREFIX + "scrub_rounds", "How often the background check came to the end of the disk tier.", scrub.num_rounds
    )
    yield GaugeMetricFamily(
        _PREFIX + "scrub_round_ratio",
        "How much of the disk tier the present round of the background check has seen.",
        scrub.round_share,
    )


def _write_budget(budget: WriteBudgetStats | None) -> Iterator[Metric]:
    if budget is None:
        return
    for name, text, value in (
        ("limit_bytes_per_day", "What may be written to the disk tier in a day.", budget.bytes_per_day),
        ("burst_bytes", "What may be written to the disk tier at once after a pause.", budget.burst_bytes),
        ("available_bytes", "What may be written to the disk tier now.", budget.available_bytes),
    ):
        yield GaugeMetricFamily(f"{_PREFIX}write_budget_{name}", text, value)
    yield CounterMetricFamily(
        _PREFIX + "write_budget_written_bytes",
        "Bytes written to the disk tier against its budget, whole slots.",
        budget.written_bytes,
    )
    yield CounterMetricFamily(
        _PREFIX + "write_budget_refused_blocks",
        "Blocks not written to the disk tier because its budget was used up.",
        budget.refused_blocks,
    )


def _latencies(stats: CacheStats) -> Iterator[Metric]:
    for name, text, counts_of in (
        (
            "load_duration_seconds",
            "From opening a sequence to the end of its loads, by the lowest tier they came from.",
            stats.load_latency,
        ),
        (
            "read_call_duration_seconds",
            "Calls that read some blocks from the tier.",
            {tier.tier: tier.read_latency for tier in stats.tiers},
        ),
        (
            "write_call_duration_seconds",
            "Calls that wrote some blocks to the tier.",
            {tier.tier: tier.write_latency for tier in stats.tiers},
        ),
    ):
        yield _histogram(name, text, counts_of)


def _histogram(name: str, text: str, counts_of: Mapping[str, LatencyCounts]) -> Metric:
    family = HistogramMetricFamily(_PREFIX + name, text, labels=["tier"])
    for tier, counts in sorted(counts_of.items()):
        buckets = [("+Inf" if bound == math.inf else str(bound), float(num)) for bound, num in counts.cumulative()]
        family.add_metric([tier], buckets, counts.sum_s)
    return family


def _window(stats: CacheStats) -> Iterator[Metric]:
    window = stats.window
    for name, text, total in (
        ("window_requests", "Finished requests in the window.", window.num_requests),
        ("window_seconds", "Since about the oldest request in the window.", window.span_s),
        ("window_prompt_tokens", "Prompt tokens." + _IN_WINDOW, window.prompt_tokens),
        ("window_cached_tokens", "Prompt tokens that were not computed." + _IN_WINDOW, window.cached_tokens),
    ):
        yield GaugeMetricFamily(_PREFIX + name, text, total)
    for name, text, read in _WINDOW_GAUGES:
        gauge = GaugeMetricFamily(_PREFIX + name, text + _IN_WINDOW, labels=["tier"])
        for tier in window.tiers:
            if (value := read(tier)) is not None:
                gauge.add_metric([tier.tier], value)
        yield gauge


def _rate(gb_per_s: float | None) -> float | None:
    return None if gb_per_s is None else gb_per_s * 1e9


def _path_info(stats: CacheStats) -> Metric:
    family = GaugeMetricFamily(_PREFIX + "tier_info", "How a tier's bytes move.", labels=["tier", "path"])
    for tier in stats.tiers:
        family.add_metric([tier.tier, tier.path], 1)
    return family


def _tier_faults(stats: CacheStats) -> Metric:
    family = CounterMetricFamily(_PREFIX + "tier_faults", "Faults of a tier.", labels=["tier", "kind"])
    for tier in stats.tiers:
        for kind, count in sorted(tier.faults.items()):
            family.add_metric([tier.tier, kind], count)
    return family


def _load_decisions(planner: PlannerStats) -> Iterator[Metric]:
    decisions = CounterMetricFamily(
        _PREFIX + "load_decisions",
        "Prefixes in lower tiers: loaded whole, in part, computed, or waited for in vain.",
        labels=["decision"],
    )
    for kind, count in sorted(planner.decisions.items()):
        decisions.add_metric([kind], count)
    yield decisions
    regret = CounterMetricFamily(
        _PREFIX + "load_regret_seconds",
        "Time to first token lost by waiting for blocks or computing them, as known afterwards.",
        labels=["tier"],
    )
    for tier, seconds in sorted(planner.regret_s.items()):
        regret.add_metric([tier], seconds)
    yield regret
    speed = GaugeMetricFamily(_PREFIX + "load_bytes_per_second", "Measured speed of a tier's loads.", labels=["tier"])
    for tier, rate in sorted(planner.lane_bytes_per_s.items()):
        speed.add_metric([tier], rate)
    yield speed
    yield CounterMetricFamily(
        _PREFIX + "declined_blocks", "Blocks a tier held that were sooner computed.", planner.declined_blocks
    )
    if planner.prefill_tokens_per_s is not None:
        yield GaugeMetricFamily(
            _PREFIX + "prefill_tokens_per_second", "Measured speed of computing prompts.", planner.prefill_tokens_per_s
        )


def _by_reason(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=["reason"])
    for reason, count in sorted(counts.items()):
        family.add_metric([reason], count)
    return family
