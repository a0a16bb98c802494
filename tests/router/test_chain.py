from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.hashing import block_keys, chain_root, pack_tokens
from dynamo.router.chain import PrefixChain

ROOT = chain_root(b"model", 4)


def lo_keys(tokens, block_size: int = 4) -> list[int]:
    return [int.from_bytes(key[:8], "little") for key in block_keys(tokens, block_size, ROOT)]


@settings(deadline=None)
@given(
    num_tokens=st.integers(0, 3000),
    asked=st.lists(st.integers(0, 900), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 4, 16, 17]),
)
def test_keys_are_the_lo_halves_of_block_keys_in_whatever_steps_they_are_asked_for(num_tokens, asked, block_size):
    tokens = np.arange(num_tokens, dtype=np.uint32) % 97
    wanted = lo_keys(tokens, block_size)
    chain = PrefixChain(ROOT.lo, pack_tokens(tokens), block_size)
    assert chain.num_blocks == len(wanted)
    for turn, count in enumerate(asked, 1):
        assert chain.keys(count) == wanted[:count]
        assert chain.num_hashed == min(max(asked[:turn]), len(wanted))


def test_nothing_is_hashed_before_it_is_asked_for_or_twice():
    chain = PrefixChain(ROOT.lo, bytes(4 * 4 * 1000), 4)
    assert chain.num_hashed == 0
    first = chain.keys(10)
    assert chain.num_hashed == 10
    assert all(a is b for a, b in zip(first, chain.keys(1000), strict=False))


def test_a_partial_last_block_has_no_key():
    assert PrefixChain(ROOT.lo, pack_tokens([1] * 7), 4).num_blocks == 1
    assert PrefixChain(ROOT.lo, b"", 4).keys(5) == []


@pytest.mark.parametrize(
    "view", [bytes, memoryview, lambda raw: memoryview(raw).cast("I"), lambda raw: array("I", raw)]
)
def test_any_contiguous_buffer_of_tokens_will_do(view):
    raw = np.arange(64, dtype=np.uint32).tobytes()
    assert PrefixChain(ROOT.lo, memoryview(view(raw)), 4).keys(16) == lo_keys(np.arange(64, dtype=np.uint32))


def test_a_list_of_keys_that_was_given_out_is_the_callers():
    chain = PrefixChain(ROOT.lo, bytes(160), 4)
    chain.keys(10).clear()
    assert len(chain.keys(10)) == 10


def test_blocks_without_tokens_are_refused():
    with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
        PrefixChain(ROOT.lo, b"", 0)
