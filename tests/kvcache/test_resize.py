"""Tiers that get another size while blocks go up and down."""

import threading

import pytest

from dynamo.kvcache.config import parse_disk_place
from dynamo.kvcache.errors import CacheConfigError
from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import block_keys, chain_root
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


def test_a_store_shrinks_and_grows_both_tiers(spec, tmp_path):

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
    try:
        for tier, sizes in (("host", (4, 32, 8)), ("disk", (6, 40, 16))):
            for num_slots in sizes:
                assert store.resize(tier, num_slots * SLOT_BYTES) == num_slots
                (usage,) = [usage for usage in store.usage() if usage.tier == tier]
                assert usage.num_slots == num_slots
        with pytest.raises(CacheConfigError, match="less than one block"):
            store.resize("host", 100)
        store.check_invariants()
    finally:
        store.close(1.0)
        device.close()
