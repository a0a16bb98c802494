"""What a cache finds out about its disk before anybody asks for a block."""

import errno
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynamo.kvcache import KVCache
from dynamo.tiers.aio import RequestQueue

TOKENS = list(range(257))  # 64 full blocks and one token to compute


@pytest.fixture
def opened(make_cache: Callable[..., KVCache], content: Any, tmp_path: Path) -> Callable[[], KVCache]:
    """Opens a cache that has all of TOKENS on disk from an earlier run."""
    disk = f"{tmp_path}:4MiB"
    with make_cache(device_blocks=128, disk=disk) as cache:
        content.run(cache, TOKENS)
        assert cache.flush()
    return lambda: make_cache(device_blocks=128, host="1MiB", disk=disk)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reads of blocks wait until it is set; the one by which O_DIRECT is proven does not."""
    opened, preadv = threading.Event(), os.preadv

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSYS, "reads shall be calls of os.preadv")

    def read(fd: int, vectors: list[memoryview], offset: int) -> int:
        assert sum(map(len, vectors)) == 4096 or opened.wait(20)
        return preadv(fd, vectors, offset)

    monkeypatch.setattr(RequestQueue, "submit", refuse)
    monkeypatch.setattr(os, "preadv", read)
    return opened


@pytest.fixture
def throttled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Has each byte of a file come at so many bytes a second the first time that it is read."""
    preadv, seen = os.preadv, set[tuple[int, int]]()

    def read_slowly(fd: int, vectors: list[memoryview], offset: int, *, bytes_per_s: float) -> int:
        size = sum(map(len, vectors))
        if (fd, offset) not in seen:
            time.sleep(size / bytes_per_s)
        seen.add((fd, offset))
        return preadv(fd, vectors, offset)

    def start(bytes_per_s: float) -> None:
        monkeypatch.setattr(os, "preadv", partial(read_slowly, bytes_per_s=bytes_per_s))

    return start


def known(cache: KVCache) -> bool:
    return "disk" in cache.stats().planner.lane_bytes_per_s


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


def test_how_fast_the_disk_is_is_known_before_the_first_prompt(opened: Callable[[], KVCache]) -> None:
    cache = opened()
    wait_until(lambda: known(cache))
    assert cache.stats().planner.decisions == {}
    assert cache.stats().tier("disk").read.blocks == 0
    assert cache.stats().tier("disk").read.failed_blocks == 0


def test_what_was_found_is_not_faster_than_the_disk(
    make_cache: Callable[..., KVCache], content: Any, tmp_path: Path, throttled: Callable[[float], None]
) -> None:
    """Even one with a cache in front of it, which answers at once for what was read before."""
    disk = f"{tmp_path}:4MiB"
    with make_cache(device_blocks=128, disk=disk) as cache:
        content.run(cache, TOKENS)
        assert cache.flush()
    speed = 1e6
    throttled(speed * cache.spec.layout.slot_bytes / cache.spec.layout.block_bytes)
    cache = make_cache(device_blocks=128, host="1MiB", disk=disk)
    wait_until(lambda: known(cache))
    assert 0.5 * speed < cache.stats().planner.lane_bytes_per_s["disk"] <= speed
    assert cache.stats().num_loads == 0


def test_a_trial_that_takes_too_long_ends_and_says_so(
    opened: Callable[[], KVCache], throttled: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.kvcache.disk_trial._TIMEOUT_S", 0.05)
    monkeypatch.setattr("dynamo.tiers.interruptible_io.MAX_CALL_BYTES", 4096)
    throttled(4096 / 0.02)
    cache = opened()
    wait_until(lambda: known(cache))
    speed = cache.stats().planner.lane_bytes_per_s["disk"]
    assert speed == pytest.approx(cache.spec.layout.block_bytes / 0.05)


def test_an_empty_disk_is_not_tried(make_cache: Callable[..., KVCache], content: Any, tmp_path: Path) -> None:
    cache = make_cache(device_blocks=128, disk=f"{tmp_path}:4MiB")
    content.run(cache, TOKENS)
    assert cache.flush()
    assert not known(cache)


def test_the_first_prompt_does_not_wait_for_a_disk_that_has_not_answered_yet(
    opened: Callable[[], KVCache], content: Any, gate: threading.Event
) -> None:
    cache = opened()
    with cache.open(TOKENS, overlap=True) as sequence:
        assert sequence.is_ready
        content.run_in_pieces(cache, sequence, TOKENS, 64)
        assert sequence.num_cached_tokens == 0
    gate.set()
    wait_until(lambda: known(cache))


def test_a_cache_is_closed_while_its_disk_is_tried(opened: Callable[[], KVCache], gate: threading.Event) -> None:
    cache = opened()
    closer = threading.Thread(target=cache.close)
    closer.start()
    gate.set()
    closer.join(20)
    assert not closer.is_alive()
    cache.check_invariants()


def test_a_disk_that_cannot_be_read_stays_unknown(
    opened: Callable[[], KVCache], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, preadv = threading.Event(), os.preadv

    def fail(fd: int, vectors: list[memoryview], offset: int) -> int:
        if sum(map(len, vectors)) == 4096 and not tried.is_set():
            return preadv(fd, vectors, offset)
        tried.set()
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "preadv", fail)
    cache = opened()
    assert tried.wait(20)
    wait_until(lambda: cache.stats().tier("disk").faults.get("io_error", 0) > 0)
    assert not known(cache)
    assert cache.stats().tier("disk").num_cached_blocks == 64
