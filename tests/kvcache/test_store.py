"""The cache over host and disk: blocks come back right, or not at all."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dynamo.kvcache import KVCache
from dynamo.tiers.disk import DiskTier

TOKENS = list(range(33))  # eight full blocks and one token to compute
OTHERS = list(range(100, 133))


def blocks_file(directory: Path) -> Path:
    (path,) = directory.rglob("blocks.dat")
    return path


def forget_memory(cache: KVCache) -> None:
    """Leaves blocks on disk only."""
    assert cache.flush()
    cache.clear("device")
    cache.clear("host")


@pytest.fixture
def disk(tmp_path) -> str:
    return f"{tmp_path / 'kv'}:4MiB"


def test_with_a_small_host_blocks_come_back_from_disk(make_cache, content, disk):
    cache = make_cache(device_blocks=9, host="16KiB", disk=disk)
    content.run(cache, TOKENS)
    content.run(cache, OTHERS)
    assert cache.flush()
    held = cache.lookup(TOKENS)
    assert held.device_tokens == 0
    assert held.host_tokens < 32
    assert held.disk_tokens == held.cached_tokens == 32
    assert content.run(cache, TOKENS) == 32
    assert cache.stats().tier("disk").hit_blocks > 0


def test_without_a_host_tier_blocks_go_to_disk_and_back(make_cache, content, disk):
    cache = make_cache(disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    assert content.run(cache, TOKENS) == 32
    assert [usage.tier for usage in cache.stats().tiers] == ["device", "disk"]


def test_what_the_disk_serves_is_kept_in_host(make_cache, content, disk):
    cache = make_cache(host="1MiB", disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    content.run(cache, TOKENS)
    assert cache.lookup(TOKENS).host_tokens == 32


def test_a_prefix_may_come_from_three_tiers_at_once(make_cache, content, disk):
    cache = make_cache(device_blocks=32, host="1MiB", disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    content.run(cache, TOKENS[:21])
    cache.clear("device")
    content.run(cache, TOKENS[:13])
    held = cache.lookup(TOKENS)
    assert (held.device_tokens, held.host_tokens, held.disk_tokens) == (12, 20, 32)
    assert content.run(cache, TOKENS) == 32


def test_a_closed_cache_is_warm_when_opened_again(spec, content, disk):
    with KVCache(spec, device="cpu", device_blocks=16, host="1MiB", disk=disk) as cache:
        content.run(cache, TOKENS)
    with KVCache(spec, device="cpu", device_blocks=16, host="1MiB", disk=disk) as cache:
        assert cache.lookup(TOKENS).disk_tokens == 32
        assert content.run(cache, TOKENS) == 32


def test_a_full_disk_tier_drops_the_tail_of_the_oldest_chain(make_cache, content, tmp_path):
    cache = make_cache(host="1MiB", disk=f"{tmp_path}:64KiB")
    assert cache.stats().tier("disk").num_slots == 16
    for start in (0, 100, 200):
        content.run(cache, list(range(start, start + 25)))
        assert cache.flush()
    cache.clear("host")
    cache.clear("device")
    assert cache.lookup(list(range(25))).disk_tokens == 16
    assert cache.lookup(list(range(100, 125))).disk_tokens == 24
    assert cache.lookup(list(range(200, 225))).disk_tokens == 24


def test_after_a_restart_eviction_still_takes_leaves_first(spec, content, tmp_path):
    place = f"{tmp_path}:64KiB"
    with KVCache(spec, device="cpu", device_blocks=32, host="1MiB", disk=place) as cache:
        content.run(cache, list(range(25)))
        content.run(cache, list(range(100, 125)))
    with KVCache(spec, device="cpu", device_blocks=32, host="1MiB", disk=place) as cache:
        content.run(cache, list(range(200, 225)))
        assert cache.flush()
        assert cache.lookup(list(range(25))).disk_tokens == 16
        assert cache.lookup(list(range(100, 125))).disk_tokens == 24


@pytest.mark.parametrize("position", [0, 3, 7])
def test_a_flipped_bit_is_noticed_counted_and_computed_again(make_cache, content, disk, tmp_path, caplog, position):
    cache = make_cache(host="1MiB", disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    slot_bytes = cache.stats().tier("disk").slot_bytes
    with blocks_file(tmp_path).open("r+b") as file:
        file.seek(position * slot_bytes + 100)
        byte = file.read(1)
        file.seek(position * slot_bytes + 100)
        file.write(bytes([byte[0] ^ 0x10]))
    assert content.run(cache, TOKENS) == 4 * position
    assert cache.stats().load_faults["corrupt"] == 1
    assert sum("digest" in record.message for record in caplog.records) == 1
    assert cache.flush()
    forget_memory(cache)
    assert content.run(cache, TOKENS) == 32


def test_a_truncated_file_costs_only_what_it_held(make_cache, content, disk, tmp_path):
    cache = make_cache(host="1MiB", disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    os.truncate(blocks_file(tmp_path), 3 * cache.stats().tier("disk").slot_bytes)
    assert content.run(cache, TOKENS) == 12
    assert cache.stats().tier("disk").faults["truncated"] >= 1
    assert cache.flush()
    forget_memory(cache)
    assert content.run(cache, TOKENS) == 32


def test_a_deleted_file_costs_only_what_it_held(make_cache, content, disk, tmp_path):
    cache = make_cache(host="1MiB", disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    blocks_file(tmp_path).unlink()
    assert content.run(cache, TOKENS) == 0
    assert cache.stats().tier("disk").faults["deleted"] == 1
    assert cache.flush()
    forget_memory(cache)
    assert content.run(cache, TOKENS) == 32


def test_a_deleted_folder_does_not_stop_the_cache(make_cache, content, disk, tmp_path):
    cache = make_cache(host="1MiB", disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    shutil.rmtree(tmp_path / "kv")
    assert content.run(cache, TOKENS) == 0
    assert content.run(cache, TOKENS) == 32


def test_two_caches_do_not_share_a_folder(make_cache, content, disk):
    first = make_cache(host="1MiB", disk=disk)
    second = make_cache(host="1MiB", disk=disk)
    assert second.stats().tier("disk").faults == {"busy": 1}
    for cache in (first, second):
        content.run(cache, TOKENS)
        assert content.run(cache, TOKENS) == 32


@pytest.fixture
def gate(monkeypatch):
    """Holds every read of a disk tier up until it is set."""
    opened = threading.Event()
    read = DiskTier.read

    def held(self, slots, rows, row_ids):
        assert opened.wait(30)
        return read(self, slots, rows, row_ids)

    monkeypatch.setattr(DiskTier, "read", held)
    yield opened
    opened.set()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


@pytest.mark.parametrize("timeout_s", [0.0, 0.1])
def test_a_late_load_is_computed_instead_and_its_bytes_arrive_nowhere(make_cache, content, disk, gate, timeout_s):
    cache = make_cache(host="1MiB", disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    with cache.open(TOKENS) as sequence:
        sequence.wait(timeout_s)
        assert sequence.num_cached_tokens == 0
        others = content.of_blocks(OTHERS)  # what is in the slots now is not what the load would bring
        for i, slot in enumerate(sequence.block_table[:8].tolist()):
            for layer in range(2):
                k, v = cache.layer(layer)
                k[slot], v[slot] = others[i][layer, 0], others[i][layer, 1]
        gate.set()
        wait_until(lambda: not cache.stats().tier("disk").num_pinned_blocks)
        content.check(cache, sequence, OTHERS, 32)
    assert cache.stats().load_faults["late"] == 8
    assert content.run(cache, TOKENS) == 32


def test_a_load_nobody_waits_for_ends_at_its_deadline(make_cache, content, disk, gate):
    cache = make_cache(host="1MiB", disk=disk, load_timeout_s=0.2)
    content.run(cache, TOKENS)
    forget_memory(cache)
    assert cache.prefetch(TOKENS).result(timeout=5) == 0
    assert cache.stats().tier("device").num_pinned_blocks == 0
    with cache.open(TOKENS) as sequence:
        wait_until(lambda: sequence.is_ready)
        sequence.wait()
        assert sequence.num_cached_tokens == 0


def test_closing_a_cache_does_not_wait_for_a_disk_that_hangs(spec, content, disk, gate, monkeypatch, caplog):
    monkeypatch.setattr("dynamo.kvcache.cache._CLOSE_TIMEOUT_S", 0.5)
    monkeypatch.setattr("dynamo.tiers.stripe_set._CLOSE_TIMEOUT_S", 0.5)
    cache = KVCache(spec, device="cpu", device_blocks=16, host="1MiB", disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    sequence = cache.open(TOKENS)
    started = time.monotonic()
    cache.close()
    assert time.monotonic() - started < 5
    assert any("still run" in record.message for record in caplog.records)
    sequence.close()


def test_a_cancelled_load_gives_everything_back(make_cache, content, disk):
    cache = make_cache(host="1MiB", disk=disk)
    content.run(cache, TOKENS)
    forget_memory(cache)
    for _ in range(20):
        cache.open(TOKENS).close()
    assert content.run(cache, TOKENS) == 32


CRASHING = """
import sys
import torch
from dynamo.kvcache import KVCache, KVSpec
spec = KVSpec(model="test", num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32, block_size=4)
cache = KVCache(spec, device="cpu", device_blocks=64, host="1MiB", disk=sys.argv[1])
import conftest
content = conftest.Content()
for start in range(0, 10**6, 100):
    content.run(cache, list(range(start, start + 33)))
    if start % 300 == 0:
        assert cache.flush()
    print(start, flush=True)
"""


def test_kill_9_while_saving_leaves_only_right_blocks(spec, content, tmp_path):
    place = f"{tmp_path}:4MiB"
    done = 0
    for _ in range(3):
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        process = subprocess.Popen(
            [sys.executable, "-c", CRASHING, place], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
        )
        with process:
            assert process.stdout is not None
            for _ in range(5):
                done = max(done, int(process.stdout.readline()))
            process.kill()
        with KVCache(spec, device="cpu", device_blocks=64, host="1MiB", disk=place) as cache:
            found = sum(content.run(cache, list(range(start, start + 33))) for start in range(0, done + 1, 100))
            assert found > 0
            assert not cache.stats().load_faults
