"""The cache loads what is sooner loaded than computed, and gives a load up before it costs more than it saves."""

import asyncio
import errno
import os
import threading
import time

import pytest

from dynamo.kvcache import KVCache, Sequence
from dynamo.kvcache.errors import SequenceStateError
from dynamo.kvcache.load_decision import TierRun
from dynamo.kvcache.overlap import OverlappedLoad
from dynamo.kvcache.planner import LoadPlanner
from dynamo.kvcache.store import BlockStore
from dynamo.tiers.aio import RequestQueue
from dynamo.tiers.device import DeviceTier

TOKENS = list(range(257))  # 64 full blocks and one token to compute


@pytest.fixture
def slow_reads(monkeypatch):
    """Makes every read of the disk take the seconds in the list's only item."""
    seconds = [0.0]
    read = os.preadv

    def refuse(*_):
        raise OSError(errno.ENOSYS, "reads shall be calls of os.preadv")

    monkeypatch.setattr(RequestQueue, "submit", refuse)

    def preadv(fd, buffers, offset, flags=0):
        time.sleep(seconds[0])
        return read(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return seconds


@pytest.fixture
def cache(make_cache, content, tmp_path) -> KVCache:
    """With all of TOKENS on disk only."""
    made = make_cache(device_blocks=128, host="1MiB", disk=f"{tmp_path / 'kv'}:4MiB")
    content.run(made, TOKENS)
    leave_on_disk(made)
    return made


def leave_on_disk(cache: KVCache) -> None:
    assert cache.flush()
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        cache.clear("device")
        cache.clear("host")
        if not cache.stats().tier("host").num_cached_blocks:
            return
        time.sleep(0.01)
    raise AssertionError("reads of a load still hold host rows")


def observe(cache: KVCache, token_s: float) -> None:
    for context in (0, 64, 128, 192):
        cache.observe_compute(64, context, 64 * token_s)


def open_s(cache: KVCache) -> tuple[float, int]:
    """Seconds until a sequence of TOKENS is ready, and how many tokens of it are cached then."""
    started = time.monotonic()
    with cache.open(TOKENS) as sequence:
        sequence.wait()
        return time.monotonic() - started, sequence.num_cached_tokens


def test_without_observations_a_load_takes_as_long_as_it_takes(cache, slow_reads):
    slow_reads[0] = 0.2
    seconds, num_cached = open_s(cache)
    assert num_cached == 256
    assert seconds >= 0.2
    assert cache.stats().planner.decisions == {"loaded": 1}


def test_a_load_that_brings_nothing_is_given_up_after_a_few_percent_of_computing(cache, slow_reads):
    observe(cache, token_s=0.004)  # the prompt: about 1 s
    slow_reads[0] = 0.7
    seconds, num_cached = open_s(cache)
    assert num_cached == 0
    assert seconds < 0.5
    planner = cache.stats().planner
    assert planner.decisions == {"gave_up": 1}
    assert 0 < planner.regret_s["disk"] < 0.5
    assert cache.stats().load_faults["late"] == 64


def test_a_load_that_is_slower_than_hoped_but_pays_is_waited_for(cache, content, slow_reads):
    observe(cache, token_s=0.05)  # the prompt: about 13 s
    slow_reads[0] = 0.05
    with cache.open(TOKENS) as sequence:
        sequence.wait()
        assert sequence.num_cached_tokens == 256
        content.check(cache, sequence, TOKENS, 256)
    assert cache.stats().planner.decisions == {"loaded": 1}
    assert cache.stats().planner.regret_s.get("disk", 0.0) == 0.0


def test_an_asynchronous_wait_ends_when_patience_does(cache, slow_reads):
    observe(cache, token_s=0.004)
    slow_reads[0] = 0.7

    async def use() -> int:
        with cache.open(TOKENS) as sequence:
            await asyncio.wait_for(sequence.ready(), 0.6)
            return sequence.num_cached_tokens

    assert asyncio.run(use()) == 0


def test_what_is_sooner_computed_is_not_even_asked_for_once_the_tier_is_known(cache, slow_reads):
    observe(cache, token_s=0.00005)  # the prompt: about 13 ms
    slow_reads[0] = 0.05
    for _ in range(4):
        open_s(cache)
        leave_on_disk(cache)
    _, num_cached = open_s(cache)
    assert num_cached == 0
    planner = cache.stats().planner
    assert planner.decisions["computed"] >= 1
    assert planner.declined_blocks >= 64
    assert cache.stats().missed_blocks == 64  # of the very first time: no tier held it then


def test_a_load_that_was_given_up_leaves_what_it_read_in_host(cache, slow_reads):
    observe(cache, token_s=0.1)  # the prompt: about 26 s, so that patience is long enough for a read to begin
    slow_reads[0] = 2.0
    assert open_s(cache)[1] == 0
    deadline = time.monotonic() + 20.0
    while not cache.lookup(TOKENS).host_tokens and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cache.lookup(TOKENS).host_tokens > 0


def test_a_prefetch_takes_its_time(cache, slow_reads):
    observe(cache, token_s=0.00005)
    slow_reads[0] = 0.1
    assert cache.prefetch(TOKENS).result(20.0) == 256
    assert not cache.stats().planner.decisions


def wait_for_load(sequence: Sequence) -> None:
    """Until all that will ever come has come, without using any of it."""
    ended = threading.Event()
    sequence.when_ready(ended.set)
    assert ended.wait(20.0)


def use_in_pieces(cache: KVCache, content, piece: int = 16) -> tuple[float, int]:
    """Seconds of waiting, and the cached tokens, of TOKENS computed in pieces while the others are loaded."""
    started = time.monotonic()
    with cache.open(TOKENS, overlap=True) as sequence:
        sequence.wait()
        waited_s = time.monotonic() - started
        content.run_in_pieces(cache, sequence, TOKENS, piece)
        return waited_s, sequence.num_cached_tokens


def test_a_caller_who_computes_meanwhile_waits_for_a_fast_disk_and_computes_one_token(cache, content):
    observe(cache, token_s=0.05)
    waited_s, num_cached = use_in_pieces(cache, content)
    assert num_cached == 256
    assert waited_s < 5.0
    assert cache.stats().planner.decisions == {"loaded": 1}
    [disk] = [tier for tier in cache.stats().window.tiers if tier.tier == "disk"]
    assert disk.hit_tokens == 256


def test_a_slow_disk_gives_the_end_of_a_prompt_while_its_start_is_computed(cache, content, slow_reads):
    observe(cache, token_s=0.001)
    slow_reads[0] = 0.02
    assert use_in_pieces(cache, content)[0] < 0.2  # an unpleasant surprise
    leave_on_disk(cache)
    with cache.open(TOKENS, overlap=True) as sequence:
        assert sequence.is_ready
        assert sequence.next_span(0, 16) == (0, 16)
        content.write(cache, sequence, TOKENS[:16], 0)
        sequence.commit(16)
        wait_for_load(sequence)
        assert sequence.next_span(16, 500) == (256, 257)
        content.check(cache, sequence, TOKENS, 256)
        assert sequence.num_cached_tokens == 240
        sequence.commit()
    planner = cache.stats().planner
    assert planner.decisions["split"] >= 1
    assert planner.declined_blocks >= 4
    assert cache.lookup(TOKENS).device_tokens == 256


def test_a_disk_that_hangs_holds_nobody_up_who_computes_meanwhile(cache, content, slow_reads):
    observe(cache, token_s=0.001)
    slow_reads[0] = 3.0
    waited_s, num_cached = use_in_pieces(cache, content)
    assert waited_s < 1.0
    assert num_cached == 0
    assert cache.stats().planner.decisions == {"gave_up": 1}


def test_what_the_time_limit_cuts_off_counts_as_late(make_cache, content, slow_reads, tmp_path):
    made = make_cache(device_blocks=128, host="1MiB", disk=f"{tmp_path / 'kv'}:4MiB", load_timeout_s=0.2)
    content.run(made, TOKENS)
    leave_on_disk(made)
    observe(made, token_s=0.1)
    slow_reads[0] = 0.6
    with made.open(TOKENS, overlap=True) as sequence:
        wait_for_load(sequence)
        assert sequence.is_ready
        content.run_in_pieces(made, sequence, TOKENS, 64)
        assert sequence.num_cached_tokens == 0
    assert made.stats().load_faults["late"] == 64


def test_a_damaged_block_is_computed_and_those_after_it_are_not(cache, content, tmp_path):
    [blocks] = (tmp_path / "kv").rglob("blocks.dat")
    with blocks.open("r+b") as file:  # one of the blocks; which one lies there does not matter
        file.seek(20 * 4096 + 100)
        file.write(b"damaged")
    with cache.open(TOKENS, overlap=True) as sequence:
        wait_for_load(sequence)
        content.run_in_pieces(cache, sequence, TOKENS, 500)
        assert sequence.num_cached_tokens == 252
    assert cache.stats().load_faults["corrupt"] == 1


def test_blocks_that_come_while_a_piece_is_chosen_are_passed_over_too(cache, content, monkeypatch):
    observe(cache, token_s=0.05)
    pass_over = OverlappedLoad.pass_over

    def pass_over_late(load: OverlappedLoad, position: int) -> int:
        count = pass_over(load, position)
        ended = threading.Event()
        load.when_ended(ended.set)
        assert ended.wait(20.0)
        return count

    with cache.open(TOKENS, overlap=True) as sequence:
        monkeypatch.setattr(OverlappedLoad, "pass_over", pass_over_late)
        assert sequence.next_span(0, 64) == (256, 257)
        content.check(cache, sequence, TOKENS, 256)


def test_who_computes_meanwhile_waits_for_everything_without_patience(make_cache, content, slow_reads, tmp_path):
    made = make_cache(device_blocks=128, host="1MiB", disk=f"{tmp_path / 'kv'}:4MiB", load_patience=None)
    content.run(made, TOKENS)
    leave_on_disk(made)
    observe(made, token_s=0.00001)
    slow_reads[0] = 0.05
    assert use_in_pieces(made, content)[1] == 256


def test_an_overlapped_sequence_can_be_awaited(cache, slow_reads):
    observe(cache, token_s=0.004)
    slow_reads[0] = 0.7

    async def use() -> bool:
        with cache.open(TOKENS, overlap=True) as sequence:
            await asyncio.wait_for(sequence.ready(), 0.6)
            return sequence.is_ready

    assert asyncio.run(use())


def test_misuse_of_overlap_is_refused(cache):
    with cache.open(TOKENS, overlap=True) as sequence:
        with pytest.raises(SequenceStateError, match="next_span"):
            _ = sequence.num_cached_tokens
        with pytest.raises(SequenceStateError, match="overlap"):
            sequence.begin_layerwise()
    with cache.open(TOKENS) as sequence, pytest.raises(SequenceStateError, match="wait"):
        sequence.next_span(0, 16)


def test_a_block_that_is_gone_when_its_load_begins_is_computed_alone(cache, content, monkeypatch):
    find_runs = BlockStore.find_runs
    gone = cache.block_keys(TOKENS)[20]

    def find_and_lose(store: BlockStore, keys) -> list[TierRun]:
        runs = find_runs(store, keys)
        store._shelf.disk.forget([gone])  # as an eviction in between does
        return runs

    monkeypatch.setattr(BlockStore, "find_runs", find_and_lose)
    with cache.open(TOKENS, overlap=True) as sequence:
        wait_for_load(sequence)
        content.run_in_pieces(cache, sequence, TOKENS, 500)
        assert sequence.num_cached_tokens == 252
    assert cache.stats().load_faults["missing"] == 1


def test_blocks_in_host_memory_that_were_computed_meanwhile_say_nothing_about_its_speed(
    make_cache, content, monkeypatch
):
    made = make_cache(device_blocks=128, host="1MiB")
    content.run(made, TOKENS)
    assert made.flush()
    made.clear("device")
    observe(made, token_s=0.001)
    write, end_part, go_on, moved = DeviceTier.write, LoadPlanner.end_part, threading.Event(), []

    def write_slowly(*arguments, **options):
        assert go_on.wait(20.0)
        return write(*arguments, **options)

    def note(planner, tier, load, num_blocks, num_moved):
        moved.append(num_moved)
        end_part(planner, tier, load, num_blocks, num_moved)

    monkeypatch.setattr(DeviceTier, "write", write_slowly)
    monkeypatch.setattr(LoadPlanner, "end_part", note)
    with made.open(TOKENS, overlap=True) as sequence:
        assert sequence.next_span(0, 240) == (0, 240)
        ended = threading.Event()
        sequence.when_ready(ended.set)
        go_on.set()
        assert ended.wait(20.0)
    assert 0 in moved
    assert sum(moved) <= 4  # of 64: the last ones, as far as nobody computed them


def test_only_what_was_handed_out_can_be_committed_and_no_block_of_others_is_written(cache, content, slow_reads):
    """A slot that is given back while a load may still write it would be somebody else's by then."""
    observe(cache, token_s=0.001)
    slow_reads[0] = 0.05
    with cache.open(TOKENS, overlap=True) as sequence:
        assert sequence.next_span(0, 16) == (0, 16)
        with pytest.raises(
            SequenceStateError, match=r"cannot commit 257 tokens, of which next_span\(\) has handed out 16"
        ):
            sequence.commit(257)
        content.write(cache, sequence, TOKENS[:16], 0)
        sequence.commit()  # these 16
        assert cache.lookup(TOKENS).device_tokens == 16
        with pytest.raises(SequenceStateError, match="after 32 tokens of which 16 are committed"):
            sequence.next_span(32, 16)
        content.run_in_pieces(cache, sequence, TOKENS, 16)
        sequence.append([1] * 7)
        content.write(cache, sequence, [*TOKENS, *[1] * 7], 64)
        sequence.commit()  # nothing is left to hand out: all of them
        assert cache.lookup([*TOKENS, *[1] * 7, 2]).device_tokens == 264


def test_without_any_block_to_load_commit_says_the_same(make_cache, content):
    made = make_cache(device_blocks=128)
    with made.open(TOKENS, overlap=True) as sequence:
        sequence.commit()
        assert not made.lookup(TOKENS).device_tokens
        assert sequence.next_span(0, 100) == (0, 100)
        content.write(made, sequence, TOKENS[:100], 0)
        sequence.commit()
        assert made.lookup(TOKENS).device_tokens == 100


@pytest.mark.parametrize(("num_computed", "max_tokens"), [(0, 0), (0, -5), (258, 1), (-1, 1)])
def test_a_span_that_makes_no_sense_is_refused(cache, num_computed, max_tokens):
    with cache.open(TOKENS, overlap=True) as sequence, pytest.raises(ValueError, match="must be"):
        sequence.next_span(num_computed, max_tokens)


def test_committing_before_the_first_span_names_the_way_out(cache):
    with cache.open(TOKENS, overlap=True) as sequence:
        sequence.wait()
        with pytest.raises(SequenceStateError, match=r"before next_span\(\)"):
            sequence.commit(16)
