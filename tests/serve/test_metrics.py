from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.kvcache.planner import PlannerStats
from dynamo.kvcache.stats import CacheStats, LatencyCounts, ScrubStats, TierUsage, WriteBudgetStats
from dynamo.kvcache.window import WindowStats, WindowTier
from dynamo.serve.cache_metrics import CacheCollector
from dynamo.serve.engine.request import OutputDelta
from dynamo.serve.metrics import GenerationMetrics, Histogram, ServerMetrics
from dynamo.tiers.stats import MovedBlocks


def samples(collector: object) -> dict[tuple[str, tuple[str, ...]], float]:
    registry = CollectorRegistry()
    registry.register(collector)  # type: ignore[arg-type]
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_histogram_buckets_are_cumulative_and_include_their_bound() -> None:
    histogram = Histogram("x_seconds", "X.", (0.1, 1.0))
    histogram.observe(0.1)
    histogram.observe(0.5, 3)
    histogram.observe(2.0)
    values = {(s.name, s.labels.get("le")): s.value for s in histogram.family().samples}
    assert values == {
        ("x_seconds_bucket", "0.1"): 1,
        ("x_seconds_bucket", "1.0"): 4,
        ("x_seconds_bucket", "+Inf"): 5,
        ("x_seconds_count", None): 5,
        ("x_seconds_sum", None): 0.1 + 1.5 + 2.0,
    }


def test_tokens_that_come_together_share_the_time_since_the_last() -> None:
    metrics = ServerMetrics()
    timing = GenerationMetrics(metrics, 1, started_s=0.0)
    timing.observe([(0, OutputDelta("a", [1]))], 1.0)
    timing.observe([(0, OutputDelta("b", [2])), (0, OutputDelta("c", [3])), (0, OutputDelta("d", [4, 5]))], 1.5)
    values = {(s.name, s.labels.get("le")): s.value for s in metrics.inter_token.family().samples}
    assert values["dynamo_inter_token_latency_seconds_bucket", "0.1"] == 0  # 0.125 s each
    assert values["dynamo_inter_token_latency_seconds_bucket", "0.15"] == 4


def test_every_server_metric_has_the_prefix() -> None:
    assert all(name.startswith("dynamo_") for name, _ in samples(ServerMetrics()))


def cache_stats() -> CacheStats:
    """Of a cache with a disk tier, every number another one."""
    tier = TierUsage(
        tier="disk",
        path="O_DIRECT",
        num_slots=10,
        slot_bytes=4096,
        num_cached_blocks=7,
        num_pinned_blocks=1,
        num_idle_blocks=6,
        hit_blocks=5,
        evicted_blocks=2,
        read=MovedBlocks(5, 20480, 1, 2, 0.5),
        write=MovedBlocks(9, 36864, 0, 3, 0.25),
        faults={"truncated": 3},
        read_latency=LatencyCounts((0, 2, *[0] * 14, 1), 60.5),
    )
    window = WindowStats(
        num_requests=3,
        num_finished=9,
        span_s=2.5,
        prompt_tokens=200,
        cached_tokens=50,
        hit_rate=0.25,
        tiers=(
            WindowTier(
                tier="disk",
                asked_tokens=100,
                hit_tokens=50,
                hit_rate=0.5,
                prompt_share=0.25,
                read=MovedBlocks(5, 20480, 0, 2, 0.5),
                write=MovedBlocks(),
            ),
        ),
    )
    return CacheStats(
        tiers=(tier,),
        num_open_sequences=1,
        requested_blocks=20,
        missed_blocks=15,
        load_faults={"corrupt": 1},
        dropped_blocks={"queue_full": 4},
        num_pending_offload_blocks=6,
        num_pending_disk_blocks=8,
        planner=PlannerStats(
            decisions={"loaded": 3, "gave_up": 1},
            regret_s={"disk": 0.25},
            declined_blocks=7,
            lane_bytes_per_s={"disk": 1e9},
            prefill_tokens_per_s=5000.0,
        ),
        num_loads=2,
        num_pins=4,
        verify_faults={"corrupt": 7},
        load_latency={"disk": LatencyCounts((5, *[0] * 16), 0.0005)},
        window=window,
        scrub=ScrubStats(num_checked=11, num_rounds=2, round_share=0.5),
        write_budget=WriteBudgetStats(
            bytes_per_day=2400, burst_bytes=100, available_bytes=40, written_bytes=360, refused_blocks=12
        ),
    )


CACHE_SAMPLES: dict[tuple[str, tuple[str, ...]], float] = {
    ("idle_blocks", ("disk",)): 6,
    ("loads", ()): 2,
    ("pins", ()): 4,
    ("verify_faults_total", ("corrupt",)): 7,
    ("scrub_checked_blocks_total", ()): 11,
    ("scrub_rounds_total", ()): 2,
    ("scrub_round_ratio", ()): 0.5,
    ("write_budget_limit_bytes_per_day", ()): 2400,
    ("write_budget_burst_bytes", ()): 100,
    ("write_budget_available_bytes", ()): 40,
    ("write_budget_written_bytes_total", ()): 360,
    ("write_budget_refused_blocks_total", ()): 12,
    ("load_duration_seconds_bucket", ("0.0001", "disk")): 5,
    ("load_duration_seconds_count", ("disk",)): 5,
    ("read_call_duration_seconds_bucket", ("0.0001", "disk")): 0,
    ("read_call_duration_seconds_bucket", ("30.0", "disk")): 2,
    ("read_call_duration_seconds_bucket", ("+Inf", "disk")): 3,
    ("read_call_duration_seconds_sum", ("disk",)): 60.5,
    ("window_requests", ()): 3,
    ("window_seconds", ()): 2.5,
    ("window_prompt_tokens", ()): 200,
    ("window_cached_tokens", ()): 50,
    ("window_asked_tokens", ("disk",)): 100,
    ("window_hit_ratio", ("disk",)): 0.5,
    ("window_prompt_ratio", ("disk",)): 0.25,
    ("window_read_bytes_per_second", ("disk",)): 40960,
    ("slots", ("disk",)): 10,
    ("capacity_bytes", ("disk",)): 40960,
    ("cached_blocks", ("disk",)): 7,
    ("pinned_blocks", ("disk",)): 1,
    ("hit_blocks_total", ("disk",)): 5,
    ("evicted_blocks_total", ("disk",)): 2,
    ("read_bytes_total", ("disk",)): 20480,
    ("read_seconds_total", ("disk",)): 0.5,
    ("read_failed_blocks_total", ("disk",)): 1,
    ("write_blocks_total", ("disk",)): 9,
    ("tier_info", ("O_DIRECT", "disk")): 1,
    ("tier_faults_total", ("truncated", "disk")): 3,
    ("load_faults_total", ("corrupt",)): 1,
    ("dropped_blocks_total", ("queue_full",)): 4,
    ("load_decisions_total", ("loaded",)): 3,
    ("load_decisions_total", ("gave_up",)): 1,
    ("load_regret_seconds_total", ("disk",)): 0.25,
    ("load_bytes_per_second", ("disk",)): 1e9,
    ("declined_blocks_total", ()): 7,
    ("prefill_tokens_per_second", ()): 5000.0,
    ("requested_blocks_total", ()): 20,
    ("missed_blocks_total", ()): 15,
    ("open_sequences", ()): 1,
    ("pending_offload_blocks", ()): 6,
    ("pending_disk_blocks", ()): 8,
}


def test_the_caches_numbers_come_out_per_tier() -> None:
    values = samples(CacheCollector(cache_stats))
    assert "dynamo_kvcache_window_write_bytes_per_second" not in {name for name, _ in values}, "nothing was written"
    assert {
        ("dynamo_kvcache_" + name, labels): value for (name, labels), value in CACHE_SAMPLES.items()
    }.items() <= values.items()
