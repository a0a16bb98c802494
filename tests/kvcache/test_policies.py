"""Policies at work in a whole cache."""

import time

import pytest

from dynamo.kvcache.errors import CacheConfigError
from dynamo.kvcache.hashing import block_keys, chain_root
from dynamo.kvcache.policies import Policies
from dynamo.kvcache.pool import BlockPlace
from dynamo.kvcache.removals import Removal

TOKENS = list(range(33))


def keys_of(cache, tokens):
    return block_keys(tokens, 4, chain_root(cache.spec.fingerprint, 4))


def test_policies_that_do_not_exist_or_do_not_go_together_are_refused(make_cache):
    with pytest.raises(CacheConfigError, match="'mru' is no policy of eviction; there are hit_density, lru, s3_fifo"):
        make_cache(eviction="mru")
    with pytest.raises(CacheConfigError, match="'never' is no policy of admission"):
        make_cache(admission="never")
    with pytest.raises(CacheConfigError, match="hit_density"):
        Policies("lru", "adaptive")


@pytest.mark.parametrize("eviction", ["hit_density", "lru", "s3_fifo"])
def test_blocks_come_back_right_under_every_policy(make_cache, content, tmp_path, eviction):
    cache = make_cache(device_blocks=12, host="48KiB", disk=f"{tmp_path}:80KiB", eviction=eviction)
    for turn in range(3):
        for start in range(0, 600, 100):
            content.run(cache, list(range(start, start + 17 + 8 * turn)))
            cache.check_invariants()
    assert cache.flush()


@pytest.mark.parametrize("eviction", ["hit_density", "lru", "s3_fifo"])
def test_a_higher_priority_outlives_and_what_expired_goes_first(make_cache, content, eviction):
    cache = make_cache(device_blocks=12, eviction=eviction)

    def run(start: int, **options: object) -> None:
        with cache.open(list(range(start, start + 16)), **options) as sequence:
            content.write(cache, sequence, list(range(start, start + 16)), 0)
            sequence.commit()

    run(0, priority=1)
    run(100)
    run(200, ttl_s=1e-6)
    run(300)
    run(400)
    held = [cache.lookup(list(range(start, start + 16))).device_tokens for start in (0, 100, 200, 300, 400)]
    assert held[0] == held[4] == 16
    assert held[2] == 0


@pytest.mark.parametrize("host", ["1MiB", None])
def test_with_second_sighting_tiers_take_what_is_offered_again(make_cache, content, tmp_path, host):
    cache = make_cache(host=host, disk=f"{tmp_path}:1MiB", admission="second_sighting")
    content.run(cache, TOKENS)
    assert cache.flush()
    assert cache.lookup(TOKENS).host_tokens == cache.lookup(TOKENS).disk_tokens == 0
    assert cache.stats().dropped_blocks["not_admitted"] == (16 if host else 8)
    first = keys_of(cache, TOKENS)[0]
    assert {place.reason for tier, place in cache.explain(first).items() if tier != "device"} == {"not_admitted"}
    cache.clear("device")
    content.run(cache, TOKENS)
    assert cache.flush()
    held = cache.lookup(TOKENS)
    assert (held.host_tokens, held.disk_tokens) == (32 if host else 0, 32)


def test_adaptive_admission_takes_blocks_while_there_is_room(make_cache, content, tmp_path):
    cache = make_cache(host="1MiB", disk=f"{tmp_path}:1MiB", admission="adaptive")
    for start in range(0, 3000, 50):
        content.run(cache, list(range(start, start + 9)))
        cache.clear("device")
        content.run(cache, list(range(start, start + 17)))
    assert cache.flush()
    assert cache.stats().tier("host").num_cached_blocks > 0


def test_a_cache_explains_where_a_block_is_and_why_it_is_not(make_cache, content):
    cache = make_cache(device_blocks=8, host="1MiB")
    content.run(cache, TOKENS[:17])
    assert cache.flush()
    first, *_, last = keys_of(cache, TOKENS[:17])
    told = cache.explain(first)
    device, host = told["device"], told["host"]
    assert isinstance(device, BlockPlace)
    assert isinstance(host, BlockPlace)
    assert (device.use.number, device.use.num_prompt_tokens, device.num_children) == (1, 17, 1)
    assert host.use.number == 1
    content.run(cache, list(range(100, 129)))
    gone = cache.explain(last)["device"]
    assert isinstance(gone, Removal)
    assert gone.reason == "evicted"
    assert gone.time_s <= time.monotonic()
    assert cache.explain(keys_of(cache, [7] * 4)[0]) == {"device": None, "host": None}


def test_a_reader_of_events_starts_with_a_snapshot(make_cache, content, spec, tmp_path):
    disk = f"{tmp_path}:1MiB"
    before = make_cache(host="1MiB", disk=disk)
    content.run(before, TOKENS)
    before.close()
    cache = make_cache(host="1MiB", disk=disk)
    snapshot = cache.snapshot()
    assert snapshot.sequence_number == -1
    assert sorted(snapshot.keys["disk"]) == sorted(keys_of(cache, TOKENS))
    assert snapshot.keys["device"] == snapshot.keys["host"] == []
    content.run(cache, TOKENS)
    told = {key for event in cache.events(snapshot.sequence_number) if event.tier == "device" for key in event.keys}
    assert told == set(cache.snapshot().keys["device"])
