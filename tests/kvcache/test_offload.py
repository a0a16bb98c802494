"""How blocks go down: what queues up is copied together, and what fails has one more try."""

import threading

from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier

TOKENS = list(range(33))
OTHERS = list(range(100, 133))
TIMEOUT_S = 10.0


def test_commits_that_queue_up_are_copied_together(make_cache, content, monkeypatch):
    cache = make_cache(device_blocks=64, host="1MiB")
    sizes: list[int] = []
    begun, go_on = threading.Event(), threading.Event()
    read = DeviceTier.read

    def note(tier, slots, rows, row_ids, after=()):
        sizes.append(len(slots))
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        return read(tier, slots, rows, row_ids, after)

    monkeypatch.setattr(DeviceTier, "read", note)
    others = list(range(100, 133))
    with cache.open(TOKENS) as first, cache.open(others) as second:
        for sequence, tokens in ((first, TOKENS), (second, others)):
            sequence.wait()
            content.write(cache, sequence, tokens, 0)
        first.commit(4)
        assert begun.wait(TIMEOUT_S)
        for end in range(8, 33, 4):
            first.commit(end)
            second.commit(end)
        go_on.set()
        assert cache.flush()
    assert sizes == [1, 7 + 8]
    cache.clear("device")
    assert content.run(cache, TOKENS) == content.run(cache, others) == 32


def test_a_block_that_cannot_be_written_has_one_more_try(make_cache, content, tmp_path, monkeypatch):
    cache = make_cache(host="1MiB", disk=f"{tmp_path}:4MiB")
    sizes: list[int] = []
    write = DiskTier.write

    def fail(tier, slots, rows, row_ids):
        outcomes = write(tier, slots, rows, row_ids)
        sizes.append(len(slots))
        if len(sizes) == 1:
            outcomes[2] = False
        return outcomes

    monkeypatch.setattr(DiskTier, "write", fail)
    content.run(cache, TOKENS)
    assert cache.flush()
    assert sizes == [8, 1]
    assert not cache.stats().dropped_blocks
    cache.clear("device")
    cache.clear("host")
    assert content.run(cache, TOKENS) == 32


def test_blocks_whose_write_fails_twice_are_dropped_with_what_follows_them_and_counted(
    make_cache, content, tmp_path, monkeypatch
):
    cache = make_cache(host="1MiB", disk=f"{tmp_path}:4MiB")

    write = DiskTier.write

    def fail(tier, slots, rows, row_ids):
        outcomes = write(tier, slots, rows, row_ids)
        outcomes[slots == 2] = False
        return outcomes

    with monkeypatch.context() as patched:
        patched.setattr(DiskTier, "write", fail)
        content.run(cache, TOKENS)
        assert cache.flush()
    assert cache.stats().dropped_blocks == {"disk_write_failed": 6}
    assert cache.lookup(TOKENS).disk_tokens == 8
    assert cache.stats().tier("disk").num_cached_blocks == 2


def test_a_used_up_write_budget_costs_no_block_that_is_on_disk_already(make_cache, content, tmp_path):
    slot_bytes = content.spec.layout.slot_bytes
    cache = make_cache(host="1MiB", disk=f"{tmp_path}:{4 * slot_bytes}", disk_write_budget=24 * 4 * slot_bytes)
    content.run(cache, TOKENS[:17])  # four blocks: as many as the tier has slots, and the hour's share has bytes
    assert cache.flush()
    content.run(cache, OTHERS)
    assert cache.flush()
    assert cache.lookup(TOKENS).disk_tokens == 16
    stats = cache.stats()
    assert stats.dropped_blocks == {"write_budget": 8}
    budget = stats.write_budget
    assert budget is not None
    assert (budget.bytes_per_day, budget.burst_bytes) == (24 * 4 * slot_bytes, 4 * slot_bytes)
    assert (budget.written_bytes, budget.refused_blocks) == (4 * slot_bytes, 8)
    assert budget.available_bytes < slot_bytes
    assert cache.status().write_budget is not None


def test_without_a_write_budget_there_is_none_to_tell_of(make_cache, tmp_path):
    assert make_cache(disk=f"{tmp_path}:1MiB").stats().write_budget is None
    assert make_cache().stats().write_budget is None
