"""`KVCache.verify`: finds what is wrong on disk while the cache works, and nothing else."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo.kvcache import KVCache
from dynamo.kvcache.errors import CacheClosedError, UnsupportedError
from dynamo.kvcache.status import ScrubStatus
from dynamo.tiers.scrub import Scrubber

SLOT = 4096
NUM_SEQUENCES = 6


def tokens_of(number: int) -> list[int]:
    return [1000 * number + i for i in range(33)]


@pytest.fixture
def cache(make_cache: Callable[..., KVCache], content: Any, tmp_path: Path) -> KVCache:
    """Has 48 blocks on disk and nowhere else."""
    # Device blocks for more than the sequences: a busy disk is behind with some.
    cache = make_cache(device_blocks=64, disk=f"{tmp_path}:{64 * SLOT}")
    for number in range(NUM_SEQUENCES):
        content.run(cache, tokens_of(number))
    assert cache.flush()
    cache.clear("device")
    return cache


def damage(folder: Path, *slots: int) -> None:
    (path,) = folder.rglob("blocks.dat")
    with path.open("r+b") as file:
        for slot in slots:
            file.seek(slot * SLOT + 100)
            byte = file.read(1)
            file.seek(slot * SLOT + 100)
            file.write(bytes([byte[0] ^ 1]))
        file.flush()
        os.fsync(file.fileno())


def test_a_sound_tier_is_found_sound(cache: KVCache) -> None:
    found = cache.verify()
    assert (found.num_blocks, found.num_checked, found.num_corrupt, found.num_unreadable) == (48, 48, 0, 0)
    assert found.is_complete
    assert cache.stats().verify_faults == {}


def test_bad_blocks_are_forgotten_and_counted_before_anybody_asks_for_them(
    cache: KVCache, content: Any, tmp_path: Path
) -> None:
    damage(tmp_path, 3, 11, 12)
    found = cache.verify()
    assert (found.num_checked, found.num_corrupt, found.num_unreadable) == (48, 3, 0)
    assert cache.stats().verify_faults == {"corrupt": 3}
    assert cache.stats().tier("disk").num_cached_blocks == 45
    assert cache.verify().num_corrupt == 0
    for number in range(NUM_SEQUENCES):
        content.run(cache, tokens_of(number))
    assert cache.stats().load_faults == {}


def test_a_check_ends_when_its_time_is_up(cache: KVCache) -> None:
    found = cache.verify(timeout_s=0.0)
    assert not found.is_complete
    assert found.num_checked == 0


def test_the_cache_goes_on_during_checks(cache: KVCache, content: Any) -> None:
    stop = threading.Event()
    results: list[Any] = []

    def check() -> None:
        while not stop.is_set():
            results.append(cache.verify(10.0))

    checker = threading.Thread(target=check)
    checker.start()
    try:
        for round_ in range(10):
            for number in range(NUM_SEQUENCES):
                content.run(cache, tokens_of(number + round_ * 3))
            if round_ % 3 == 0:
                cache.clear("disk")
    finally:
        stop.set()
        checker.join(30)
    assert results
    assert cache.flush()
    assert cache.verify().is_complete
    stats = cache.stats()
    assert stats.verify_faults == stats.load_faults == {}


def test_without_a_disk_tier_there_is_nothing_to_check(make_cache: Callable[..., KVCache]) -> None:
    for cache in (make_cache(), make_cache(host=16 * SLOT)):
        with pytest.raises(UnsupportedError, match="no disk tier"):
            cache.verify()


def test_a_closed_cache_is_not_checked(cache: KVCache) -> None:
    cache.close()
    with pytest.raises(CacheClosedError):
        cache.verify()


@pytest.mark.parametrize("timeout_s", [-1.0, float("inf"), float("nan")])
def test_a_check_has_an_end(cache: KVCache, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        cache.verify(timeout_s)


# --- in the background


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


@pytest.fixture
def scrubbed(make_cache: Callable[..., KVCache], cache: KVCache, tmp_path: Path) -> Callable[[], KVCache]:
    """Opens what `cache` left on disk again, to be checked in the background."""
    cache.close()
    return lambda: make_cache(device_blocks=24, disk=f"{tmp_path}:{64 * SLOT}", scrub_bytes_per_s="1GiB")


def scrub(cache: KVCache) -> ScrubStatus:
    status = cache.status().scrub
    assert status is not None
    return status


def test_bad_blocks_are_found_and_forgotten_while_nobody_uses_the_disk(
    scrubbed: Callable[[], KVCache], content: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(tmp_path, 5, 40)
    cache = scrubbed()
    wait_until(lambda: scrub(cache).num_rounds == 1)
    assert scrub(cache).num_checked == 48
    assert scrub(cache).last_round_s is not None
    assert cache.stats().verify_faults == {"corrupt": 2}
    assert cache.stats().tier("disk").num_cached_blocks == 46
    assert cache.stats().tier("disk").read.blocks == 0
    assert [record.message for record in caplog.records if "in the background" in record.message]
    for number in range(NUM_SEQUENCES):
        content.run(cache, tokens_of(number))
    assert cache.stats().load_faults == {}


def test_a_disk_that_gives_nothing_at_all_keeps_its_blocks(
    scrubbed: Callable[[], KVCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, "the disk is gone")

    cache = scrubbed()
    monkeypatch.setattr(os, "preadv", fails)
    wait_until(lambda: scrub(cache).num_rounds == 1)
    monkeypatch.undo()
    assert scrub(cache).num_checked == 0
    assert cache.stats().verify_faults == {}
    assert cache.stats().tier("disk").num_cached_blocks == 48


def test_closing_waits_for_one_small_read_of_the_check(
    make_cache: Callable[..., KVCache], content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_blocks = 512
    disk = f"{tmp_path}:{num_blocks * SLOT}"
    with make_cache(device_blocks=num_blocks + 1, disk=disk) as cache:
        content.run(cache, list(range(4 * num_blocks + 1)))
        assert cache.flush()
    reading, closing = threading.Event(), threading.Event()
    num_bytes: list[int] = []
    preadv, close = os.preadv, Scrubber.close

    def slow(fd: int, vectors: list[memoryview], offset: int) -> int:
        if threading.current_thread().name == "kv-scrub":
            num_bytes.append(sum(map(len, vectors)))
            reading.set()
            assert closing.wait(20)
        return preadv(fd, vectors, offset)

    def told(scrubber: Scrubber, timeout_s: float) -> None:
        closing.set()
        close(scrubber, timeout_s)

    cache = make_cache(device_blocks=24, disk=disk, scrub_bytes_per_s="1GiB")
    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(Scrubber, "close", told)
    assert reading.wait(20)
    cache.close()
    assert num_bytes == [256 << 10]
    assert cache.stats().verify_faults == {}


def test_without_a_rate_nothing_is_checked(cache: KVCache, make_cache: Callable[..., KVCache]) -> None:
    assert cache.status().scrub is None
    assert make_cache(scrub_bytes_per_s="8MiB").status().scrub is None
