"""Tiers that get another size while blocks go up and down."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dynamo.kvcache.config import parse_disk_place
from dynamo.kvcache.errors import CacheConfigError
from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import block_keys, chain_root
from dynamo.kvcache.offload import SaveRequest
from dynamo.kvcache.planner import LoadPlanner
from dynamo.kvcache.shelf import Shelf
from dynamo.kvcache.stats import CacheCounters
from dynamo.kvcache.store import BlockStore
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.host import HostTier

SLOT_BYTES = 4096


@pytest.fixture
def shelf(spec):
    arena = HostTier(spec.layout, 8, num_staging=1)
    yield Shelf(arena, 8, None, EventLog(), CacheCounters())
    arena.close()


def keep(shelf, keys):
    hold = shelf.hold([keys])
    rows = shelf.take_rows(len(keys), 0.0, (shelf.host,), hold, lambda: False)
    shelf.release_rows(shelf.keep_in_host(keys, rows, [None, *keys[:-1]]))
    shelf.let_go(hold)


def test_a_smaller_tier_tells_what_it_forgot(shelf):
    keys = block_keys(list(range(32)), 4, chain_root(b"", 4))
    keep(shelf, keys)
    assert shelf.resize("host", 5, 0.0)
    shelf.check_invariants()
    assert shelf.count_prefix(keys)[0] == 5
    (removed,) = [event for event in shelf.events.read(-1) if type(event).__name__ == "Removed"]
    assert sorted(removed.keys) == sorted(keys[5:])


def test_slots_in_use_are_waited_for(shelf):
    keys = block_keys(list(range(32)), 4, chain_root(b"", 4))
    keep(shelf, keys)
    hold = shelf.hold([keys])
    assert not shelf.resize("host", 5, 0.0)
    waiting = threading.Timer(0.05, shelf.let_go, [hold])
    waiting.start()
    assert shelf.resize("host", 5, 10.0)
    waiting.join()
    shelf.check_invariants()
    assert shelf.host.num_available == 5


@pytest.fixture
def store(spec, tmp_path):
    device = DeviceTier(spec.layout, spec.dtype, 4, "cpu")
    store = BlockStore.open(
        spec,
        device,
        EventLog(),
        CacheCounters(),
        LoadPlanner(block_size=spec.block_size, block_bytes=spec.layout.block_bytes),
        host_bytes=8 * SLOT_BYTES,
        disk=parse_disk_place(f"{tmp_path}:{16 * 4}KiB"),
        io_threads=1,
        max_host_bytes=32 * SLOT_BYTES,
    )
    yield store
    store.close(1.0)
    device.close()


def test_a_store_shrinks_and_grows_both_tiers(store):
    for tier, sizes in (("host", (4, 32, 8)), ("disk", (6, 40, 16))):
        for num_slots in sizes:
            assert store.resize(tier, num_slots * SLOT_BYTES) == num_slots
            (usage,) = [usage for usage in store.usage() if usage.tier == tier]
            assert usage.num_slots == num_slots
    with pytest.raises(CacheConfigError, match="less than one block"):
        store.resize("host", 100)
    store.check_invariants()


def test_a_resize_waits_for_another_one_no_longer_than_for_blocks_in_use(store):
    keys = block_keys(list(range(16)), 4, chain_root(b"", 4))
    assert store.save(SaveRequest(keys, 0, np.arange(4), [], release=lambda: None), 1.0)
    assert store.flush(10.0)
    pin = store.pin(keys, "host")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.resize, "host", SLOT_BYTES, 1.0)
        while next(store.usage()).num_slots != 1:
            assert not first.done()
        with pytest.raises(TimeoutError, match="another resize"):
            store.resize("host", 8 * SLOT_BYTES, 0.01)
        with pytest.raises(TimeoutError, match="3 blocks of the host tier are in use"):
            first.result(10.0)
    pin.release()
    assert store.resize("host", SLOT_BYTES) == 1


@pytest.fixture
def striped_cache(make_cache, tmp_path):
    folders = ",".join(str(tmp_path / name) for name in "abc")
    return make_cache(
        device_blocks=12, host=4 * SLOT_BYTES, host_max=12 * SLOT_BYTES, disk=f"{folders}:{12 * SLOT_BYTES}"
    )


def test_a_size_without_a_block_in_each_directory_is_refused_before_anything_is_evicted(striped_cache, content):
    tokens = list(range(40))
    content.run(striped_cache, tokens)
    assert striped_cache.flush()
    held = striped_cache.lookup(tokens)
    with pytest.raises(CacheConfigError, match="less than one block of 4 KiB in each of its 3 directories"):
        striped_cache.resize("disk", 2 * SLOT_BYTES)
    assert striped_cache.lookup(tokens) == held
    assert striped_cache.resize("disk", 3 * SLOT_BYTES) == 3
