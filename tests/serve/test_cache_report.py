import asyncio
import logging
from typing import Any

import pytest
import torch

from dynamo.kvcache import KVCache, KVSpec
from dynamo.serve.cache_report import describe_cache, report_cache

SPEC = KVSpec(model="report", num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32, block_size=4)


def test_the_line_tells_shares_occupancy_and_what_went_wrong() -> None:
    with KVCache(SPEC, device="cpu", device_blocks=10) as cache:
        assert describe_cache(cache.stats()).startswith("last 0 requests: none of 0 prompt tokens cached")
        for _ in range(2):
            with cache.open(list(range(10))) as sequence:
                sequence.wait()
                sequence.commit()
        line = describe_cache(cache.stats())
    assert line == "last 2 requests: 40.0 % of 20 prompt tokens cached (device 40.0 %); full: device 20.0 %"


def test_nothing_is_logged_while_nothing_happens(run: Any, eventually: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with KVCache(SPEC, device="cpu", device_blocks=10) as cache:
        looks = 0

        def stats() -> Any:
            nonlocal looks
            looks += 1
            return cache.stats()

        async def report() -> None:
            task = asyncio.create_task(report_cache(stats, 0.001))
            await asyncio.to_thread(eventually, lambda: looks >= 3)
            assert not caplog.records
            cache.open([1]).close()
            await asyncio.to_thread(eventually, lambda: bool(caplog.records))
            seen = looks
            await asyncio.to_thread(eventually, lambda: looks >= seen + 3)
            task.cancel()

        run(report())
    (record,) = caplog.records
    assert "last 1 requests" in record.getMessage()
