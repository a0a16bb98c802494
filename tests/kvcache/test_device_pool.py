"""The device pool, where a cache closes while somebody waits for its blocks."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dynamo.kvcache import KVSpec
from dynamo.kvcache.device_pool import DevicePool
from dynamo.kvcache.errors import CacheClosedError
from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.stats import CacheCounters
from dynamo.tiers.device import DeviceTier

NUM_BLOCKS = 4
TIMEOUT_S = 10.0
KEYS = [BlockKey(bytes([i]) * 16) for i in range(NUM_BLOCKS)]


class SeenPool(DevicePool):
    """Tells when somebody has begun to ask for slots: `close` gets the lock from there on only while that one waits."""

    def __init__(self, spec: KVSpec) -> None:
        tier = DeviceTier(spec.layout, torch.float32, NUM_BLOCKS, "cpu")
        super().__init__(tier, EventLog(), CacheCounters())
        self.asked = threading.Event()

    def check_open(self) -> None:
        super().check_open()
        self.asked.set()


@pytest.mark.parametrize(
    "ask", [lambda pool: pool.reserve(KEYS[:2], NUM_BLOCKS, 0), lambda pool: pool.grow(2)], ids=["reserve", "grow"]
)
def test_who_waits_for_blocks_of_a_pool_that_is_closed_gets_none(
    spec: KVSpec, monkeypatch: pytest.MonkeyPatch, ask: Callable[[DevicePool], object]
) -> None:
    monkeypatch.setattr("dynamo.kvcache.device_pool._PIN_WAIT_S", TIMEOUT_S)
    pool = SeenPool(spec)
    held = pool.reserve([], NUM_BLOCKS, 0).fresh
    pool.share(KEYS, held, None)
    pool.pin(held)
    pool.release(held)
    pool.asked.clear()
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask, pool)
        assert pool.asked.wait(TIMEOUT_S)
        pool.close()
        pool.unpin(held)
        assert isinstance(asking.exception(TIMEOUT_S), CacheClosedError)
    pool.check_invariants()
    assert pool.num_available == NUM_BLOCKS
