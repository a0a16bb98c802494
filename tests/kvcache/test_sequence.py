import asyncio

import pytest

from dynamo.kvcache import KVCache, OutOfBlocksError
from dynamo.kvcache.errors import CacheClosedError, SequenceStateError


def test_a_second_sequence_shares_the_first_ones_blocks(make_cache, content):
    cache = make_cache()
    tokens = list(range(14))
    with cache.open(tokens) as first:
        assert first.num_cached_tokens == 0
        content.write(cache, first, tokens, 0)
        first.commit()
        with cache.open([*tokens[:12], 99]) as second:
            assert second.num_cached_tokens == 12
            assert second.block_table[:3].tolist() == first.block_table[:3].tolist()
            assert second.block_table[3] != first.block_table[3]


def test_one_token_is_always_left_to_compute(make_cache, content):
    cache = make_cache()
    tokens = list(range(8))
    content.run(cache, tokens)
    assert content.run(cache, tokens) == 4
    assert content.run(cache, [*tokens, 8]) == 8


def test_only_committed_full_blocks_are_shared(make_cache):
    cache = make_cache()
    with cache.open(list(range(12))) as sequence:
        sequence.commit(7)
        assert cache.lookup(list(range(12))).device_tokens == 4
    assert cache.lookup(list(range(12))).device_tokens == 4


def test_append_reserves_blocks_and_commit_shares_what_was_generated(make_cache, content):
    cache = make_cache()
    with cache.open([0, 1, 2]) as sequence:
        for token in range(3, 9):
            sequence.append([token])
        assert sequence.num_tokens == 9
        assert len(sequence.block_table) == 3
        content.write(cache, sequence, list(range(9)), 0)
        sequence.commit(8)
    assert content.run(cache, list(range(9))) == 8


def test_append_is_all_or_nothing(make_cache):
    cache = make_cache(device_blocks=3)
    with cache.open(list(range(8))) as sequence, cache.open([1]):
        with pytest.raises(OutOfBlocksError) as caught:
            sequence.append(list(range(5)))
        assert (caught.value.needed_blocks, caught.value.available_blocks) == (2, 0)
        assert sequence.num_tokens == 8
        assert len(sequence.block_table) == 2


def test_equal_blocks_computed_twice_are_kept_once(make_cache, content):
    cache = make_cache()
    tokens = list(range(9))
    with cache.open(tokens) as first, cache.open(tokens) as second:
        for sequence in (first, second):
            content.write(cache, sequence, tokens, 0)
            sequence.commit()
        assert first.block_table[:2].tolist() == second.block_table[:2].tolist()
        cache.check_invariants()
    assert cache.stats().tier("device").num_cached_blocks == 2


def test_committing_before_the_loads_have_ended_is_refused(make_cache, content):
    cache = make_cache(device_blocks=4, host="1MiB")
    tokens = list(range(16))
    content.run(cache, tokens)
    assert cache.flush()
    cache.clear("device")
    with cache.open(tokens) as sequence:
        with pytest.raises(SequenceStateError, match="wait"):
            sequence.commit()
        with pytest.raises(SequenceStateError, match="wait"):
            _ = sequence.num_cached_tokens


def test_committing_beyond_the_tokens_is_refused(make_cache):
    with make_cache().open([1, 2]) as sequence, pytest.raises(SequenceStateError, match="3 tokens"):
        sequence.commit(3)


def test_closing_twice_releases_once_and_a_closed_sequence_is_of_no_use(make_cache):
    cache = make_cache()
    sequence = cache.open([1, 2, 3])
    sequence.close()
    sequence.close()
    cache.check_invariants()
    for use in (lambda: sequence.append([4]), sequence.commit):
        with pytest.raises(CacheClosedError):
            use()


def test_ready_awaits_the_loads_without_blocking_the_loop(make_cache, content):
    cache = make_cache(host="1MiB")
    tokens = list(range(16))
    content.run(cache, tokens)
    assert cache.flush()
    cache.clear("device")

    async def use() -> int:
        with cache.open(tokens) as sequence:
            await sequence.ready()
            assert sequence.is_ready
            content.check(cache, sequence, tokens, sequence.num_cached_tokens)
            return sequence.num_cached_tokens

    assert asyncio.run(use()) == 12


PREPARATIONS = {
    "fresh": lambda cache: cache.open(list(range(500, 516))),
    "loading": lambda cache: cache.open(list(range(16))),
    "overlapped": lambda cache: cache.open(list(range(16)), overlap=True),
    "loading by layers": lambda cache: begun(cache.open(list(range(16)))),
    "saving by layers": lambda cache: saving(cache.open(list(range(500, 516)))),
}
USES = {
    "wait": lambda sequence: sequence.wait(),
    "ready": lambda sequence: asyncio.run(sequence.ready()),
    "next_span": lambda sequence: sequence.next_span(0, 16),
    "begin_layerwise": lambda sequence: sequence.begin_layerwise(),
    "wait_layer": lambda sequence: sequence.wait_layer(1),
    "append": lambda sequence: sequence.append([1] * 9),
    "commit_layer": lambda sequence: sequence.commit_layer(0),
    "commit": lambda sequence: sequence.commit(),
}


def begun(sequence):
    sequence.begin_layerwise()
    return sequence


def saving(sequence):
    sequence.commit_layer(0)
    return sequence


@pytest.mark.parametrize("state", PREPARATIONS)
def test_a_sequence_that_outlives_its_cache_says_so_and_can_be_closed(spec, content, state):
    cache = KVCache(spec, device="cpu", device_blocks=16, host="1MiB")
    content.run(cache, list(range(16)))
    assert cache.flush()
    cache.clear("device")
    sequence = PREPARATIONS[state](cache)
    number = cache.event_log.last_number
    cache.close()
    for use in USES.values():
        with pytest.raises(CacheClosedError, match="the cache is closed"):
            use(sequence)
    assert sequence.num_tokens == 16
    assert len(sequence.block_table) == 4
    assert cache.events(after=number) == []
    with sequence:
        pass
    sequence.close()
    assert cache.stats().num_open_sequences == 0
    assert not any(tier.num_pinned_blocks for tier in cache.stats().tiers)
    cache.check_invariants()


def test_of_a_sequence_closed_before_its_cache_it_is_told_what_was_closed(spec):
    cache = KVCache(spec, device="cpu", device_blocks=16, host="1MiB")
    sequence = cache.open([1, 2, 3])
    sequence.close()
    cache.close()
    for use in USES.values():
        with pytest.raises(CacheClosedError, match="the sequence is closed"):
            use(sequence)
