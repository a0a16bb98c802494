"""Leaves go first in every tier, however a chain came to be there: what is left of it is always its beginning."""

import random
import threading

import pytest

from dynamo.kvcache import OutOfBlocksError
from dynamo.kvcache.hashing import block_keys, chain_root
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.stripe import Stripe


def run_in_pieces(cache, content, tokens, piece: int) -> int:
    """A prompt in chunks, and then token by token, as an engine computes it."""
    with cache.open(tokens[: len(tokens) // 2]) as sequence:
        sequence.wait()
        cached = sequence.num_cached_tokens
        for end in range(cached + piece, len(tokens) // 2, piece):
            content.write(cache, sequence, tokens[:end], 0 if not cached else cached // 4)
            sequence.commit(end)
        for token in tokens[len(tokens) // 2 :]:
            sequence.append([token])
            if sequence.num_tokens % 4 == 0:
                content.write(cache, sequence, tokens[: sequence.num_tokens], cached // 4)
                sequence.commit()
        content.write(cache, sequence, tokens, cached // 4)
        sequence.commit()
    return cached


def pattern(cache, tokens, tier: str) -> str:
    """One letter per block: # where `tier` holds it, . where not. From what the cache told in its events."""
    held: set[bytes] = set()
    for event in cache.events():
        if event.tier == tier:
            name = type(event).__name__
            held = (
                held | set(event.keys) if name == "Stored" else held - set(event.keys) if name == "Removed" else set()
            )
    keys = block_keys(tokens, 4, chain_root(cache.spec.fingerprint, 4))
    return "".join("#" if key in held else "." for key in keys)


@pytest.fixture
def slow_offloads(monkeypatch):
    """Offloads and disk writes that end after the sequences they belong to."""
    for tier, method in ((DeviceTier, "read"), (DiskTier, "write")):
        original = getattr(tier, method)

        def slow(self, *args, original=original, **options):
            threading.Event().wait(0.003)
            return original(self, *args, **options)

        monkeypatch.setattr(tier, method, slow)


@pytest.mark.parametrize("piece", [4, 12, 100])
def test_what_is_left_of_a_chain_is_its_beginning(make_cache, content, tmp_path, slow_offloads, piece):
    rng = random.Random(piece)
    cache = make_cache(device_blocks=40, host=f"{30 * 4}KiB", disk=f"{tmp_path}:{50 * 4}KiB")
    chains = [[100 + chain, *range(rng.randrange(30, 70))] for chain in range(8)]
    for _ in range(3):
        for tokens in rng.sample(chains, len(chains)):
            run_in_pieces(cache, content, tokens, piece)
            if rng.random() < 0.3:
                assert cache.flush()
    assert cache.flush()
    cache.check_invariants()
    for tier in ("device", "host", "disk"):
        for tokens in chains:
            held = pattern(cache, tokens, tier)
            assert "." not in held.rstrip("."), f"{tier}: {held}"


@pytest.mark.parametrize(("host", "disk"), [(16, None), (16, 32), (None, 32)])
def test_of_a_prompt_larger_than_a_tier_the_beginning_is_kept(make_cache, content, tmp_path, host, disk):
    cache = make_cache(device_blocks=64, host=host and f"{4 * host}KiB", disk=disk and f"{tmp_path}:{4 * disk}KiB")
    tokens = list(range(4 * 48))
    run_in_pieces(cache, content, tokens, 20)
    assert cache.flush()
    cache.clear("device")
    held = cache.lookup(tokens)
    assert held.host_tokens == 4 * (host or 0)
    assert held.disk_tokens == 4 * (disk or 0), cache.stats()
    assert cache.stats().dropped_blocks
    for _ in range(2):
        assert content.run(cache, tokens) == held.cached_tokens
        assert cache.flush()
        cache.clear("device")


def test_a_full_disk_goes_on_with_the_room_it_has(make_cache, content, tmp_path, monkeypatch):
    def refuse(self, file, end):
        """As when the file system is full: the file stays as long as it is."""

    cache = make_cache(host="1MiB", disk=f"{tmp_path}:256KiB")
    for start in range(0, 400, 100):
        content.run(cache, list(range(start, start + 17)))
    assert cache.flush()
    monkeypatch.setattr(Stripe, "_grow", refuse)
    for start in range(1000, 3000, 100):
        content.run(cache, list(range(start, start + 17)))
        assert cache.flush()
    assert cache.lookup(list(range(2900, 2917))).disk_tokens == 16
    assert cache.lookup(list(range(17))).disk_tokens == 0


def test_an_error_while_writing_gives_the_slots_back(make_cache, content, tmp_path, monkeypatch):
    def broken(self, slots, rows, row_ids):
        raise MemoryError("no memory for this")

    cache = make_cache(host="1MiB", disk=f"{tmp_path}:64KiB")
    monkeypatch.setattr(DiskTier, "write", broken)
    for start in range(0, 800, 100):
        content.run(cache, list(range(start, start + 17)))
        assert cache.flush()
    cache.check_invariants()
    assert cache.stats().tier("disk").num_pinned_blocks == 0
    monkeypatch.undo()
    content.run(cache, list(range(900, 917)))
    assert cache.flush()
    assert cache.lookup(list(range(900, 917))).disk_tokens == 16


def test_loads_from_host_go_on_while_the_disk_hangs(make_cache, content, tmp_path, monkeypatch):
    cache = make_cache(device_blocks=64, host="192KiB", disk=f"{tmp_path}:1MiB", load_timeout_s=5.0)
    on_disk = [list(range(start, start + 17)) for start in range(0, 1200, 100)]
    for tokens in on_disk:
        content.run(cache, tokens)
        assert cache.flush()
    cache.clear("device")
    cache.clear("host")
    in_host = list(range(5000, 5017))
    content.run(cache, in_host)
    assert cache.flush()
    cache.clear("device")
    gate = threading.Event()
    read = DiskTier.read

    def held(self, slots, rows, row_ids):
        assert gate.wait(30)
        return read(self, slots, rows, row_ids)

    monkeypatch.setattr(DiskTier, "read", held)
    waiting = [cache.open(tokens) for tokens in on_disk[:8]]
    try:
        assert content.run(cache, in_host) == 16
    finally:
        gate.set()
        for sequence in waiting:
            sequence.close()


def test_an_admission_that_fails_evicts_nothing(make_cache, content):
    cache = make_cache(device_blocks=12)
    content.run(cache, list(range(32)))
    with cache.open([7] * 8), pytest.raises(OutOfBlocksError):
        cache.open([9] * 36, spare_blocks=2)
    assert cache.lookup(list(range(32))).device_tokens == 32
