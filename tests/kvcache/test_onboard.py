"""How blocks come up: two hops at once, one more try for what cannot be read, none for what is damaged."""

import threading

import pytest

from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.mover import Mover, Priority

TOKENS = list(range(33))
TIMEOUT_S = 10.0


@pytest.fixture
def on_disk(make_cache, content, tmp_path):
    """A cache that has TOKENS on disk only."""

    def make(host="1MiB"):
        cache = make_cache(host=host, disk=f"{tmp_path}:4MiB")
        content.run(cache, TOKENS)
        assert cache.flush()
        cache.clear("device")
        cache.clear("host")
        return cache

    return make


@pytest.mark.parametrize("host", [None, "1MiB"])
def test_one_part_is_copied_to_the_device_while_the_next_is_read(on_disk, content, monkeypatch, host):
    monkeypatch.setattr("dynamo.kvcache.store._PART_BYTES", 4 * 4096)
    cache = on_disk(host)
    both_busy = threading.Barrier(2)
    num_reads = num_writes = 0
    read, write = DiskTier.read, DeviceTier.write

    def read_and_meet(tier, slots, rows, row_ids):
        nonlocal num_reads
        num_reads += 1
        if num_reads == 2:
            both_busy.wait(TIMEOUT_S)  # returns only if a copy to the device is under way now
        return read(tier, slots, rows, row_ids)

    def write_and_meet(tier, slots, rows, row_ids, after=()):
        nonlocal num_writes
        num_writes += 1
        if num_writes == 1:
            both_busy.wait(TIMEOUT_S)
        return write(tier, slots, rows, row_ids, after)

    with monkeypatch.context() as patched:
        patched.setattr(DiskTier, "read", read_and_meet)
        patched.setattr(DeviceTier, "write", write_and_meet)
        assert content.run(cache, TOKENS) == 32
    assert not both_busy.broken
    assert num_reads == num_writes == 2


def faulty_reads(monkeypatch, num_faults: int) -> list[int]:
    """Makes the first block of the first reads unreadable; returns the sizes of all reads."""
    sizes: list[int] = []
    read = DiskTier.read

    def fail(tier, slots, rows, row_ids):
        outcomes = read(tier, slots, rows, row_ids)
        sizes.append(len(slots))
        if len(sizes) <= num_faults:
            outcomes[0] = False
        return outcomes

    monkeypatch.setattr(DiskTier, "read", fail)
    return sizes


def test_a_block_that_cannot_be_read_is_read_once_more(on_disk, content, monkeypatch):
    cache = on_disk()
    sizes = faulty_reads(monkeypatch, 1)
    assert content.run(cache, TOKENS) == 32
    assert sizes == [8, 1]
    assert not cache.stats().load_faults


def test_a_block_that_fails_twice_is_computed(on_disk, content, monkeypatch):
    cache = on_disk()
    sizes = faulty_reads(monkeypatch, 2)
    assert content.run(cache, TOKENS) == 0
    assert sizes == [8, 1]
    assert cache.stats().load_faults == {"unreadable": 1}


def test_a_damaged_block_is_not_read_again(on_disk, content, monkeypatch):
    cache = on_disk()
    sizes: list[int] = []
    read = DiskTier.read

    def damage(tier, slots, rows, row_ids):
        outcomes = read(tier, slots, rows, row_ids)
        sizes.append(len(slots))
        rows[row_ids[3], 5] ^= 1
        return outcomes

    with monkeypatch.context() as patched:
        patched.setattr(DiskTier, "read", damage)
        assert content.run(cache, TOKENS) == 12
    assert sizes == [8]
    assert cache.stats().load_faults == {"corrupt": 1}


def test_prefetches_are_less_urgent_than_requests(on_disk, monkeypatch):
    cache = on_disk()
    seen: list[Priority] = []
    submit = Mover.submit

    def note(mover, transfer, parts, on_done, *, priority=Priority.LOAD, **options):
        seen.append(priority)
        submit(mover, transfer, parts, on_done, priority=priority, **options)

    monkeypatch.setattr(Mover, "submit", note)
    assert cache.prefetch(TOKENS).result(TIMEOUT_S) == 32
    cache.clear("device")
    with cache.open(TOKENS) as sequence:
        sequence.wait()
    assert seen == [Priority.PREFETCH, Priority.LOAD]
