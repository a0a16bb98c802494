"""Pins: who ends them, how often, and how much they may hold."""

import gc
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo.kvcache import KVCache
from dynamo.kvcache.errors import CacheClosedError, CacheConfigError, PinLimitError
from dynamo.kvcache.leases import MAX_PINNED_SHARE

TOKENS = list(range(33))  # 8 full blocks
SLOT = 4096


@pytest.fixture
def cache(make_cache: Callable[..., KVCache], content: Any, tmp_path: Path) -> KVCache:
    """Holds the 8 blocks of TOKENS in device memory, host memory (of 16) and disk (of 32)."""
    cache = make_cache(device_blocks=24, host=16 * SLOT, disk=f"{tmp_path}:{32 * SLOT}")
    content.run(cache, TOKENS)
    assert cache.flush()
    return cache


def fill(cache: KVCache, content: Any, num_sequences: int) -> None:
    """Pushes older blocks out of the tiers."""
    for number in range(num_sequences):
        content.run(cache, [1000 * (number + 1) + i for i in range(33)])
        cache.flush()


def pinned(cache: KVCache, tier: str) -> int:
    return cache.stats().tier(tier).num_pinned_blocks


def test_pinned_blocks_outlive_all_others(cache: KVCache, content: Any) -> None:
    with cache.pin(TOKENS, tiers=["device", "host", "disk"], name="system prompt") as lease:
        assert lease.blocks == {"device": 8, "host": 8, "disk": 8}
        (info,) = cache.pins()
        assert (info.pin_id, info.name, info.num_tokens, info.blocks) == (
            lease.pin_id,
            "system prompt",
            32,
            lease.blocks,
        )
        fill(cache, content, 8)
        held = cache.lookup(TOKENS)
        assert (held.device_tokens, held.host_tokens, held.disk_tokens) == (32, 32, 32)
        cache.clear()
        assert cache.lookup(TOKENS).cached_tokens == 32
    assert cache.pins() == ()
    fill(cache, content, 8)
    assert cache.lookup(TOKENS).cached_tokens == 0


def test_a_lease_ends_exactly_once(cache: KVCache) -> None:
    lease = cache.pin(TOKENS)
    with lease:
        assert cache.unpin(lease.pin_id)
        assert not lease.is_active
        assert not lease.release()
        assert not lease.extend(10)
    assert not cache.unpin(lease.pin_id)
    assert not cache.unpin("pin_of_nobody")
    assert pinned(cache, "host") == pinned(cache, "disk") == 0


def test_many_who_end_a_lease_at_once_end_it_once(cache: KVCache) -> None:
    for _ in range(20):
        lease = cache.pin(TOKENS)
        barrier = threading.Barrier(4)
        results: list[bool] = []

        def end(lease: Any = lease, barrier: Any = barrier, results: Any = results) -> None:
            barrier.wait(10)
            results.append(lease.release())

        threads = [threading.Thread(target=end) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sorted(results) == [False, False, False, True]
    cache.check_invariants()


def test_a_pin_whose_owner_dies_vanishes(cache: KVCache, eventually: Any) -> None:
    def owner() -> None:
        lease = cache.pin(TOKENS)
        assert lease.is_active
        raise RuntimeError("the owner dies without a word")

    with pytest.raises(RuntimeError):
        owner()
    gc.collect()
    eventually(lambda: cache.pins() == ())
    assert pinned(cache, "host") == 0


def test_a_pin_with_a_time_to_live_needs_no_owner_and_ends_by_itself(cache: KVCache, eventually: Any) -> None:
    pin_id = cache.pin(TOKENS, ttl_s=3600).pin_id
    gc.collect()
    short = cache.pin(TOKENS, ttl_s=0.01)
    eventually(lambda: not short.is_active)
    (info,) = cache.pins()
    assert info.pin_id == pin_id
    assert info.remaining_s is not None and 3500 < info.remaining_s <= 3600
    assert pinned(cache, "disk") == 8


def test_a_lease_can_be_given_more_time_and_less(cache: KVCache, eventually: Any) -> None:
    lease = cache.pin(TOKENS, ttl_s=0.2)
    assert lease.extend(3600)
    other = cache.pin(TOKENS, ttl_s=0.3)
    eventually(lambda: not other.is_active)
    assert lease.is_active
    assert lease.extend(0.01)
    eventually(lambda: not lease.is_active)


def test_pins_may_hold_only_a_share_of_a_tier_and_the_same_blocks_count_once(cache: KVCache, content: Any) -> None:
    assert int(16 * MAX_PINNED_SHARE) == 8
    leases = [cache.pin(TOKENS) for _ in range(3)]
    other = [500 + i for i in range(17)]
    content.run(cache, other)
    assert cache.flush()
    with pytest.raises(PinLimitError, match=r"12 blocks of the host tier, of which they may hold 8, 50%") as caught:
        cache.pin(other)
    assert (caught.value.tier, caught.value.needed_blocks, caught.value.allowed_blocks) == ("host", 12, 8)
    assert pinned(cache, "host") == pinned(cache, "disk") == 8, "what was refused holds nothing"
    with cache.pin(other, tiers=["disk"]) as lease:
        assert lease.blocks == {"disk": 4}
    for lease in leases:
        lease.release()
    assert cache.pin(other).blocks == {"host": 4, "disk": 4}


def test_absent_tiers_are_passed_over_and_unknown_ones_refused(
    make_cache: Callable[..., KVCache], content: Any
) -> None:
    cache = make_cache(device_blocks=24)
    content.run(cache, TOKENS)
    assert cache.pin(TOKENS).blocks == {}
    assert cache.pin(TOKENS, tiers=["device"]).blocks == {"device": 8}
    with pytest.raises(CacheConfigError, match="'tape' is no tier"):
        cache.pin(TOKENS, tiers=["tape"])  # type: ignore[list-item]


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), 1e12])
def test_times_to_live_are_above_zero_and_finite(cache: KVCache, ttl_s: float) -> None:
    with pytest.raises(ValueError, match="ttl_s must be above 0"):
        cache.pin(TOKENS, ttl_s=ttl_s)


def test_closing_the_cache_ends_its_pins(make_cache: Callable[..., KVCache], content: Any) -> None:
    cache = make_cache(host=16 * SLOT)
    content.run(cache, TOKENS)
    lease = cache.pin(TOKENS)
    cache.close()
    assert not lease.is_active
    assert not lease.release()
    with pytest.raises(CacheClosedError):
        cache.pin(TOKENS)


def test_closing_says_once_how_many_pins_end_with_the_cache(cache: KVCache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynamo.kvcache.leases")
    leases = [cache.pin(TOKENS, name=name) for name in ("tools", "a\nb", "")]
    cache.pin(TOKENS, name="ended").release()
    cache.close()
    cache.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "dynamo.kvcache.leases"]
    assert lines == ["the cache is closed with 3 active pins, which end now: 'a\\nb', 'tools'"]
    assert not any(lease.is_active for lease in leases)


def test_closing_without_pins_says_nothing_of_them(cache: KVCache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynamo.kvcache.leases")
    cache.close()
    assert not [record for record in caplog.records if record.name == "dynamo.kvcache.leases"]
