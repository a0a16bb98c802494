"""The controller beside traffic: whatever an operator does meanwhile, sequences get right bytes and the books balance."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dynamo.kvcache import KVCache
from dynamo.kvcache.errors import CacheConfigError, CacheMemoryError, OutOfBlocksError, PinLimitError, UnsupportedError

SLOT = 4096


def test_operators_and_sequences_at_once(
    make_cache: Callable[..., KVCache], content: Any, tmp_path: Path, eventually: Any
) -> None:
    cache = make_cache(device_blocks=64, host=48 * SLOT, host_max=96 * SLOT, disk=f"{tmp_path}:{96 * SLOT}")
    prompts = [[1000 * number + i for i in range(33)] for number in range(12)]
    deadline = time.monotonic() + 3.0
    failures: list[BaseException] = []

    def repeat(work: Callable[[random.Random], object], seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < deadline:
                with suppress(OutOfBlocksError, PinLimitError):
                    work(rng)
        except BaseException as error:  # noqa: BLE001  # whatever it is, the test tells it
            failures.append(error)

    def serve(rng: random.Random) -> None:
        content.run(cache, rng.choice(prompts))

    def pin(rng: random.Random) -> None:
        tiers = rng.sample(["device", "host", "disk"], 2)
        lease = cache.pin(rng.choice(prompts), tiers=tiers, ttl_s=rng.choice([None, 0.01, 5]))  # type: ignore[arg-type]
        if rng.random() < 0.5:
            lease.release()

    def operate(rng: random.Random) -> None:
        cache.clear(rng.choice(["device", "host", "disk"]))
        cache.prefetch(rng.choice(prompts))
        cache.status()
        cache.explain(cache.block_keys(rng.choice(prompts))[3])
        with suppress(TimeoutError):
            cache.resize(rng.choice(["host", "disk"]), rng.choice([24, 48, 96]) * SLOT)

    def check(rng: random.Random) -> None:
        found = cache.verify(10.0)
        assert (found.num_corrupt, found.num_unreadable) == (0, 0)

    works = [serve, serve, pin, operate, check]
    threads = [threading.Thread(target=repeat, args=(work, seed)) for seed, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures
    for info in cache.pins():
        cache.unpin(info.pin_id)
    assert cache.flush()
    eventually(lambda: cache.stats().num_open_sequences == 0)
    stats = cache.stats()
    assert stats.window.num_finished > 0
    assert "corrupt" not in stats.load_faults
    assert all(tier.num_pinned_blocks == 0 for tier in stats.tiers)


def test_a_prefetch_leaves_a_block_for_every_open_sequence(make_cache: Callable[..., KVCache], content: Any) -> None:
    cache = make_cache(device_blocks=9, host=32 * SLOT)
    tokens = list(range(33))
    content.run(cache, tokens)
    assert cache.flush()
    cache.clear("device")
    with cache.open([7]), pytest.raises(OutOfBlocksError):
        cache.prefetch(tokens)
    with cache.open([7]):
        assert cache.prefetch(tokens[:28]).result(10) == 28


def test_the_status_adds_up(make_cache: Callable[..., KVCache], content: Any, tmp_path: Path) -> None:
    cache = make_cache(device_blocks=16, host=12 * SLOT, disk=f"{tmp_path}:{32 * SLOT}")
    content.run(cache, list(range(33)))
    assert cache.flush()
    with cache.open(list(range(33))) as sequence, cache.pin(list(range(16))):
        sequence.wait()
        status = cache.status()
        device, host, disk = status.tiers
        assert (device.num_cached_blocks, device.num_pinned_blocks, device.num_idle_blocks) == (8, 9, 0)
        assert (host.num_cached_blocks, host.num_pinned_blocks, host.num_idle_blocks) == (8, 4, 4)
        assert (disk.num_bytes, disk.num_cached_bytes) == (32 * SLOT, 8 * SLOT)
        assert (status.num_open_sequences, len(status.pins)) == (1, 1)
    cache.close()
    assert cache.status().pins == ()


def test_a_tier_takes_another_size_while_it_works(
    make_cache: Callable[..., KVCache], content: Any, tmp_path: Path
) -> None:
    cache = make_cache(host=8 * SLOT, host_max="1MiB", disk=f"{tmp_path}:{32 * SLOT}")
    assert cache.resize("host", 16 * SLOT) == 16
    for number in range(4):
        content.run(cache, [1000 * number + i for i in range(33)])
    assert cache.flush()
    assert cache.resize("disk", 4 * SLOT) == 4
    assert cache.resize("host", "16KiB") == 4
    tiers = {tier.tier: (tier.num_slots, tier.num_cached_blocks) for tier in cache.status().tiers}
    assert (tiers["host"], tiers["disk"]) == ((4, 4), (4, 4))
    with pytest.raises(CacheConfigError, match=r"can have up to 1 MiB, not 1 GiB.*host_max"):
        cache.resize("host", "1GiB")
    with pytest.raises(CacheMemoryError, match=r"index of .* blocks on disk takes .* make the disk tier smaller"):
        cache.resize("disk", 2**60)
    cache.clear("device")
    for number in range(4):
        content.run(cache, [1000 * number + i for i in range(33)])


def test_what_cannot_be_resized_says_so(make_cache: Callable[..., KVCache]) -> None:
    cache = make_cache()
    with pytest.raises(UnsupportedError, match="views of it"):
        cache.resize("device", "1GiB")
    with pytest.raises(UnsupportedError, match="made without a host tier"):
        cache.resize("host", "1GiB")
    with pytest.raises(CacheConfigError, match="is no size"):
        cache.resize("host", "much")
    with pytest.raises(CacheConfigError, match="'tape' is no tier"):
        cache.resize("tape", 1)  # type: ignore[arg-type]
