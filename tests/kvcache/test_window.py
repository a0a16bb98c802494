"""The sliding window: what it counts, over what, and that it forgets."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo.kvcache import KVCache
from dynamo.kvcache.window import RequestHits, RequestWindow, WindowStats
from dynamo.tiers.stats import TierRecorder, TierStats

TOKENS = list(range(33))


class Tiers:
    """Three tiers that move what they are told to."""

    def __init__(self) -> None:
        self.recorders = {name: TierRecorder(100) for name in ("device", "host", "disk")}

    def __call__(self) -> Iterator[TierStats]:
        for name, recorder in self.recorders.items():
            yield recorder.snapshot(name, 1, "test")


def of_tiers(stats: WindowStats, field: str) -> dict[str, Any]:
    return {tier.tier: getattr(tier, field) for tier in stats.tiers}


def test_an_empty_window_has_no_rates() -> None:
    stats = RequestWindow(Tiers()).snapshot()
    assert (stats.num_requests, stats.prompt_tokens, stats.hit_rate) == (0, 0, None)
    assert (
        of_tiers(stats, "hit_rate") == of_tiers(stats, "prompt_share") == {"device": None, "host": None, "disk": None}
    )


def test_lower_tiers_answer_for_what_the_device_lacked_and_shares_add_up() -> None:
    window = RequestWindow(Tiers())
    window.add(RequestHits(100, 96, 32, 48, 0))
    window.add(RequestHits(60, 48, 48, 0, 0))  # all on the device: no question to the tiers below
    window.add(RequestHits(40, 32, 0, 0, 16))
    stats = window.snapshot()
    assert stats.prompt_tokens == 200
    assert of_tiers(stats, "asked_tokens") == {"device": 176, "host": 96, "disk": 96}
    assert of_tiers(stats, "hit_tokens") == {"device": 80, "host": 48, "disk": 16}
    assert of_tiers(stats, "hit_rate") == pytest.approx({"device": 80 / 176, "host": 0.5, "disk": 1 / 6})
    assert of_tiers(stats, "prompt_share") == pytest.approx({"device": 0.4, "host": 0.24, "disk": 0.08})
    assert stats.cached_tokens == 144
    assert stats.hit_rate == pytest.approx(0.72)


def test_old_requests_leave_the_window_and_with_them_what_was_moved_then() -> None:
    tiers = Tiers()
    window = RequestWindow(tiers, num_requests=32)
    tiers.recorders["host"].add_read(1000, 0, 1.0)
    for _ in range(64):
        window.add(RequestHits(100, 96, 0, 96, 0))
    tiers.recorders["host"].add_read(5, 0, 0.001)
    for _ in range(32):
        window.add(RequestHits(100, 96, 0, 0, 0))
    stats = window.snapshot()
    assert (stats.num_requests, stats.num_finished, stats.cached_tokens) == (32, 96, 0)
    read = of_tiers(stats, "read")["host"]
    assert (read.blocks, read.bytes) == (5, 500)
    assert read.gb_per_s == pytest.approx(500 / 0.001 / 1e9)


def test_before_the_window_is_full_all_that_was_moved_counts() -> None:
    tiers = Tiers()
    window = RequestWindow(tiers, num_requests=1000)
    for _ in range(100):
        tiers.recorders["disk"].add_write(1, 0, 0.5)
        window.add(RequestHits(16, 0, 0, 0, 0))
    assert of_tiers(window.snapshot(), "write")["disk"].blocks == 100


def test_a_cache_counts_each_request_under_the_tiers_it_got_its_blocks_from(
    make_cache: Callable[..., KVCache], content: Any, tmp_path: Path
) -> None:
    cache = make_cache(host=16 * 4096, disk=f"{tmp_path}:{32 * 4096}")
    content.run(cache, TOKENS)
    assert cache.flush()
    content.run(cache, TOKENS)  # device
    cache.clear("device")
    content.run(cache, TOKENS)  # host
    cache.clear("device")
    cache.clear("host")
    content.run(cache, TOKENS)  # disk
    cache.clear("device")
    cache.prefetch(TOKENS).result(10)  # no request
    stats = cache.stats()
    assert stats.window.num_requests == 4
    assert of_tiers(stats.window, "hit_tokens") == {"device": 32, "host": 32, "disk": 32}
    assert of_tiers(stats.window, "asked_tokens") == {"device": 128, "host": 96, "disk": 96}
    assert {tier: counts.num for tier, counts in stats.load_latency.items()} == {"host": 2, "disk": 1}
    assert stats.tier("disk").read_latency.num >= 1
    assert stats.tier("host").num_idle_blocks == stats.tier("host").num_cached_blocks == 8
    assert stats.num_loads == 0
