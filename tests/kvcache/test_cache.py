import os
import threading
import time

import pytest

from dynamo.kvcache import KVCache, OutOfBlocksError, Sequence, store
from dynamo.kvcache.errors import CacheClosedError, CacheConfigError, CacheMemoryError
from dynamo.kvcache.events import Cleared, Removed, Stored


def test_opening_more_than_the_pool_holds_reserves_nothing(make_cache):
    cache = make_cache(device_blocks=4)
    with pytest.raises(OutOfBlocksError, match="5 device blocks are needed and 4"):
        cache.open(list(range(17)))
    cache.check_invariants()
    assert cache.stats().num_open_sequences == 0


def test_evicted_blocks_come_back_from_host(make_cache, content):
    cache = make_cache(device_blocks=4, host="1MiB")
    first, second = list(range(16)), list(range(100, 116))
    content.run(cache, first)
    content.run(cache, second)
    assert cache.flush()
    assert cache.lookup(first).device_tokens == 0
    assert cache.lookup(first).host_tokens == 16
    assert content.run(cache, first) == 12
    assert cache.stats().tier("host").hit_blocks == 3


def test_salts_keep_tenants_apart(make_cache, make_content):
    cache = make_cache(host="1MiB")
    tokens = list(range(16))
    alice, bob = make_content(salt="alice"), make_content(salt="bob")
    assert alice.run(cache, tokens, salt="alice") == 0
    assert bob.run(cache, tokens, salt="bob") == 0
    assert alice.run(cache, tokens, salt="alice") == bob.run(cache, tokens, salt="bob") == 12
    assert cache.lookup(tokens).cached_tokens == 0


def test_lookup_changes_nothing(make_cache, content):
    cache = make_cache(device_blocks=8, host="1MiB")
    old, young = list(range(16)), list(range(100, 116))
    content.run(cache, old)
    content.run(cache, young)
    cache.lookup(old)
    content.run(cache, list(range(200, 204)))
    assert cache.lookup(old).device_tokens < 16 == cache.lookup(young).device_tokens


def test_prefetch_brings_a_prefix_into_device_memory(make_cache, content):
    cache = make_cache(device_blocks=8, host="1MiB")
    tokens = list(range(16))
    content.run(cache, tokens)
    assert cache.flush()
    cache.clear("device")
    assert cache.prefetch(tokens).result(timeout=10) == 16
    assert cache.lookup(tokens).device_tokens == 16
    assert cache.prefetch([7, 7, 7, 7, 7]).result(timeout=10) == 0


def test_clear_spares_what_is_in_use(make_cache, content):
    cache = make_cache(host="1MiB")
    tokens = list(range(8))
    with cache.open(tokens) as sequence:
        content.write(cache, sequence, tokens, 0)
        sequence.commit()
        assert cache.flush()
        cache.clear()
        assert cache.lookup(tokens).device_tokens == 8
        assert cache.lookup(tokens).host_tokens == 0
    cache.clear("device")
    assert cache.lookup(tokens).cached_tokens == 0


def test_events_tell_what_each_tier_gained_and_lost(make_cache, content):
    cache = make_cache(device_blocks=2, host="1MiB")
    content.run(cache, list(range(8)))
    assert cache.flush()
    content.run(cache, list(range(100, 104)))
    assert cache.flush()
    events = cache.events()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    stored = [event for event in events if isinstance(event, Stored) and event.tier == "device"]
    removed = [event for event in events if isinstance(event, Removed)]
    assert [len(event.keys) for event in stored] == [2, 1]
    assert removed[0].tier == "device"
    assert removed[0].keys == (stored[0].keys[1],)
    assert {event.tier for event in events if isinstance(event, Stored)} == {"device", "host"}
    cache.clear("host")
    assert [(type(event), event.tier) for event in cache.events(after=events[-1].sequence_number)] == [
        (Cleared, "host")
    ]


def test_many_threads_share_one_cache(make_cache, content):
    cache = make_cache(device_blocks=64, host="1MiB")
    errors: list[BaseException] = []

    def use(worker: int) -> None:
        try:
            for turn in range(20):
                content.run(cache, [turn % 3, *range(13), worker % 2])
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=use, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert cache.flush()


def test_a_closed_cache_says_so(spec):
    cache = KVCache(spec, device="cpu", device_blocks=4, host="1MiB")
    cache.close()
    cache.close()
    for use in (cache.open, cache.lookup, cache.prefetch, cache.pin):
        with pytest.raises(CacheClosedError):
            use([1])


def test_what_a_cache_gave_away_ends_with_it(spec, content):
    cache = KVCache(spec, device="cpu", device_blocks=16, host="1MiB")
    content.run(cache, list(range(16)))
    assert cache.flush()
    lease = cache.pin(list(range(16)))
    assert lease.is_active
    cache.close()
    assert not lease.is_active
    assert not lease.extend(60.0)
    assert not lease.release()
    assert cache.pins() == ()
    cache.check_invariants()


def test_a_prefetch_that_its_cache_does_not_outlive_is_told_so(spec, content, tmp_path, monkeypatch):
    cache = KVCache(spec, device="cpu", device_blocks=16, disk=f"{tmp_path}:1MiB")
    content.run(cache, list(range(16)))
    assert cache.flush()
    cache.clear("device")
    reading, closing = threading.Event(), threading.Event()
    read = os.preadv

    def slow(*arguments):
        reading.set()
        assert closing.wait(20)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    prefetch = cache.prefetch(list(range(16)))
    assert reading.wait(20)
    closer = threading.Thread(target=cache.close)
    closer.start()
    deadline = time.monotonic() + 20
    with pytest.raises(CacheClosedError):
        while time.monotonic() < deadline:
            cache.lookup([1])
    closing.set()
    closer.join(20)
    assert isinstance(prefetch.exception(timeout=20), CacheClosedError)
    cache.check_invariants()


def test_a_prefetch_that_fails_at_its_end_tells_who_waits_for_it(make_cache, content, monkeypatch, caplog):
    cache = make_cache(host="1MiB")
    content.run(cache, list(range(16)))
    assert cache.flush()
    cache.clear("device")
    close, fault = Sequence.close, RuntimeError("the device failed")

    def fail(sequence):
        close(sequence)
        raise fault

    monkeypatch.setattr(Sequence, "close", fail)
    assert cache.prefetch(list(range(16))).exception(timeout=10) is fault
    assert "a prefetch of KV blocks failed" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_blocks": 0}, "device_blocks"),
        ({"host": "1KB"}, "less than one block"),
        ({"host": "8 GB GB"}, "no size"),
        ({"host": -5}, "negative"),
        ({"disk": "/nowhere"}, "PATH:SIZE"),
        ({"disk": "/nowhere:1KB"}, "less than one block"),
        ({"host": "2MiB", "host_max": "1MiB"}, "host_max=1 MiB"),
        ({"host_max": "1MiB"}, "give a host tier"),
        ({"io_threads": 0}, "io_threads must be at least 1, not 0"),
        ({"load_patience": -0.5}, "load_patience must be .* not -0.5"),
        ({"load_timeout_s": -1.0}, "load_timeout_s must be seconds from 0 on, not -1.0"),
        ({"load_timeout_s": float("nan")}, "load_timeout_s must be .* not nan"),
    ],
)
def test_wrong_sizes_and_paths_are_named(spec, options, message):
    with pytest.raises(CacheConfigError, match=message):
        KVCache(spec, device="cpu", **{"device_blocks": 4, **options})


@pytest.mark.parametrize(("tokens", "message"), [([], "at least one"), ([-1], "token ids"), ([2**32], "token ids")])
def test_what_is_no_prompt_is_refused(make_cache, tokens, message):
    cache = make_cache()
    with pytest.raises(ValueError, match=message):
        cache.open(tokens)
    assert cache.stats().num_open_sequences == 0


@pytest.mark.parametrize(
    ("tier", "sizes"), [("host", {"device_blocks": 4, "host": "900TiB"}), ("device", {"device_blocks": 1 << 40})]
)
def test_more_memory_than_there_is_is_refused_with_the_tier_and_both_sizes(spec, tier, sizes):
    with pytest.raises(CacheMemoryError, match=rf"the {tier} tier needs .* available") as caught:
        KVCache(spec, device="cpu", **sizes)
    assert caught.value.tier == tier


def test_tiers_that_fit_one_by_one_but_not_together_are_warned_of(spec, monkeypatch, caplog):
    monkeypatch.setattr(store, "available_memory_bytes", lambda: 10 << 20)
    num_blocks = (8 << 20) // spec.layout.slot_bytes
    with KVCache(spec, device="cpu", device_blocks=num_blocks, host="2MiB"):
        assert caplog.messages == []
    with KVCache(spec, device="cpu", device_blocks=num_blocks, host="4MiB"):
        assert "a device tier of 8 MiB and a host tier of 4 MiB are more together than the 10 MiB" in caplog.text


def test_clearing_what_is_no_tier_is_refused_and_an_absent_tier_tells_nobody(make_cache):
    cache = make_cache()
    with pytest.raises(CacheConfigError, match="'remote' is no tier; there are device, host, disk"):
        cache.clear("remote")
    cache.clear("disk")
    assert cache.events() == []


def test_layers_that_do_not_exist_and_closed_caches_are_told_in_this_packages_errors(spec):
    with KVCache(spec, device="cpu", device_blocks=4) as cache, pytest.raises(CacheConfigError, match="layer"):
        cache.layer(99)
    with pytest.raises(CacheClosedError):
        cache.layer(0)


def test_equal_blocks_committed_twice_are_told_once(make_cache, content):
    cache = make_cache()
    tokens = list(range(12))
    with cache.open(tokens) as first, cache.open([*tokens[:8], 99]) as second:
        for sequence in (first, second):
            content.write(cache, sequence, tokens, 0)
            sequence.commit(8)
        second.commit()
        first.commit()
    stored = [event for event in cache.events() if isinstance(event, Stored)]
    assert [len(event.keys) for event in stored] == [2, 1]
    assert stored[1].parent == stored[0].keys[1]


def test_blocks_asked_to_be_spared_stay_available(make_cache):
    cache = make_cache(device_blocks=8)
    with pytest.raises(OutOfBlocksError) as caught:
        cache.open(list(range(16)), spare_blocks=5)
    assert (caught.value.needed_blocks, caught.value.available_blocks) == (9, 8)
    with cache.open(list(range(16)), spare_blocks=4):
        assert cache.num_available_blocks == 4


def test_prefetch_needs_no_more_blocks_than_the_prefix_has(make_cache, content):
    cache = make_cache(device_blocks=4, host="1MiB")
    content.run(cache, list(range(16)))
    assert cache.flush()
    cache.clear("device")
    requested = cache.stats().requested_blocks
    assert cache.prefetch(list(range(16))).result(timeout=10) == 16
    assert cache.stats().requested_blocks == requested


def test_host_traffic_is_counted(make_cache, content):
    cache = make_cache(host="1MiB")
    content.run(cache, list(range(16)))
    assert cache.flush()
    assert cache.stats().tier("host").write.blocks == 4
    cache.clear("device")
    content.run(cache, list(range(16)))
    assert cache.stats().tier("host").read.blocks == 3
    assert cache.stats().tier("host").read.bytes == 3 * cache.spec.layout.block_bytes


def test_a_snapshot_says_what_follows_what(make_cache, content):
    cache = make_cache(device_blocks=8, host="1MiB")
    first, second = list(range(20)), [*range(8), *range(50, 62)]
    for tokens in (first, second, list(range(200, 216))):
        content.run(cache, tokens)
    assert cache.flush()
    parents = {}
    for tokens in (first, second, list(range(200, 216))):
        keys = cache.block_keys(tokens)
        parents |= dict(zip(keys, [None, *keys], strict=False))
    snapshot = cache.snapshot()
    assert {tier: len(keys) for tier, keys in snapshot.keys.items()} == {"device": 8, "host": 12}
    for tier, keys in snapshot.keys.items():
        starts = dict(snapshot.starts[tier])
        assert [starts.get(i, keys[i - 1]) for i in range(len(keys))] == [parents[key] for key in keys]
