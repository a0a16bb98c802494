import math

from dynamo.tiers.latency import LATENCY_BOUNDS_S, LatencyCounts, LatencyHistogram
from dynamo.tiers.stats import TierRecorder


def test_bounds_ascend_and_include_what_equals_them() -> None:
    assert list(LATENCY_BOUNDS_S) == sorted(set(LATENCY_BOUNDS_S))
    histogram = LatencyHistogram()
    for seconds in (0.0, LATENCY_BOUNDS_S[0], LATENCY_BOUNDS_S[0] * 1.01, 1e6):
        histogram.add(seconds)
    counts = histogram.snapshot()
    assert (counts.counts[0], counts.counts[1], counts.counts[-1], counts.num) == (2, 1, 1, 4)
    assert counts.cumulative()[0] == (LATENCY_BOUNDS_S[0], 2)
    assert counts.cumulative()[-2:] == [(LATENCY_BOUNDS_S[-1], 3), (math.inf, 4)]


def test_nothing_observed_is_a_row_of_zeros() -> None:
    assert LatencyCounts().num == 0
    assert {count for _, count in LatencyCounts().cumulative()} == {0}


def test_a_snapshot_does_not_change_any_more() -> None:
    histogram = LatencyHistogram()
    before = histogram.snapshot()
    histogram.add(1.0)
    assert (before.num, histogram.snapshot().num) == (0, 1)


def test_a_recorder_times_calls_by_direction_and_not_those_that_moved_nothing() -> None:
    recorder = TierRecorder(100)
    recorder.add_read(0, 0, 5.0)
    recorder.add_read(4, 0, 0.002)
    recorder.add_write(1, 3, 0.5)
    stats = recorder.snapshot("disk", 8, "test")
    assert (stats.read_latency.num, stats.read_latency.sum_s) == (1, 0.002)
    assert (stats.write_latency.num, stats.write_latency.sum_s) == (1, 0.5)
    assert stats.read.gb_per_s == 400 / 0.002 / 1e9
    assert recorder.snapshot("disk", 8, "test").read.since(stats.read).gb_per_s is None
