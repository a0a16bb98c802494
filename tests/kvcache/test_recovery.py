"""The order of eviction found again after a restart, against a plain walk up every chain."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.lineage import NO_PARENT
from dynamo.kvcache.pool import BlockPool
from dynamo.kvcache.recovery import order_recovered, recover
from dynamo.tiers.journal import ROOT_NAME, RecoveredBlocks


def walked_order(parent: list[int]) -> list[int]:
    """Reference: every block passes its position to its ancestors; leaves go before parents."""
    last_use = list(range(len(parent)))
    depth = []
    for use in range(len(parent)):
        steps, ancestor = 0, parent[use]
        while ancestor != NO_PARENT:
            last_use[ancestor] = max(last_use[ancestor], use)
            steps, ancestor = steps + 1, parent[ancestor]
        depth.append(steps)
    return sorted(range(len(parent)), key=lambda block: (last_use[block], -depth[block]))


@st.composite
def forests(draw) -> list[int]:
    """Parents of blocks recorded in any order, often right after their parents."""
    count = draw(st.integers(0, 40))
    parent = []
    for block in range(count):
        kind = draw(st.sampled_from(["follows", "follows", "follows", "branches", "starts"]))
        parent.append(
            NO_PARENT
            if kind == "starts" or not block
            else block - 1
            if kind == "follows"
            else draw(st.integers(0, block - 1))
        )
    places = list(range(count))
    if draw(st.booleans()):
        places = draw(st.permutations(places))
    moved = [NO_PARENT] * count
    for block, above in enumerate(parent):
        moved[places[block]] = NO_PARENT if above == NO_PARENT else places[above]
    return moved


@st.composite
def interleaved_forests(draw) -> list[int]:
    """Parents of blocks that several sequences recorded in turn, now and then one without the others."""
    num_sequences = draw(st.integers(2, 6))
    last = [NO_PARENT] * num_sequences
    parent: list[int] = []
    for step in range(draw(st.integers(0, 60))):
        number = draw(st.integers(0, num_sequences - 1)) if draw(st.integers(0, 9)) == 0 else step % num_sequences
        parent.append(last[number])
        last[number] = NO_PARENT if draw(st.integers(0, 9)) == 0 else len(parent) - 1
    if parent and draw(st.booleans()):
        parent = [NO_PARENT if above == NO_PARENT else len(parent) - 1 - above for above in reversed(parent)]
    return parent


@settings(deadline=None)
@given(st.one_of(forests(), interleaved_forests()))
def test_the_order_is_that_of_a_plain_walk(parent):
    found = order_recovered(np.array(parent, dtype=np.int64))
    assert found.order.tolist() == walked_order(parent)
    assert found.ends[-1:] == [len(parent)] * bool(parent)


@settings(deadline=None)
@given(st.lists(st.integers(-1, 15), min_size=1, max_size=16))
def test_blocks_below_a_ring_are_left_out_and_the_others_kept(wanted):
    parent = [above if above < len(wanted) else NO_PARENT for above in wanted]
    sound = []
    for block in range(len(parent)):
        ancestor, steps = block, 0
        while ancestor != NO_PARENT and steps <= len(parent):
            ancestor, steps = parent[ancestor], steps + 1
        if ancestor == NO_PARENT:
            sound.append(block)
    order = order_recovered(np.array(parent, dtype=np.int64)).order.tolist()
    assert sorted(order) == sound
    for place, block in enumerate(order):
        assert parent[block] not in order[:place]


def name(number: int) -> bytes:
    return number.to_bytes(16, "big") if number else ROOT_NAME


def recovered(names: list[int], parents: list[int], slots: list[int]) -> RecoveredBlocks:
    def packed(numbers: list[int]) -> np.ndarray:
        return np.frombuffer(b"".join(map(name, numbers)), dtype=np.uint8).reshape(-1, 16)

    places = [names.index(parent) if parent in names else NO_PARENT for parent in parents]
    return RecoveredBlocks(
        packed(names),
        packed(parents),
        np.array(places, dtype=np.int64),
        np.array(slots, dtype=np.int64),
        np.zeros(len(names), dtype=np.uint64),
        np.zeros(len(names), dtype=np.uint8),
    )


def test_a_pool_goes_on_where_the_index_left_off():
    pool = BlockPool(10)
    recover(pool, recovered([1, 2, 11, 3, 12], [0, 1, 0, 2, 11], [9, 0, 4, 2, 7]))
    pool.check_invariants()
    assert pool.find(BlockKey(name(3))) == 2
    assert pool.num_free == 5
    evicted = pool.allocate(10).evicted_keys
    assert evicted == [name(number) for number in (3, 2, 1, 12, 11)]


def test_a_block_whose_parent_was_lost_is_found_again_with_it():
    pool = BlockPool(4)
    recover(pool, recovered([2, 3], [1, 2], [0, 1]))
    pool.check_invariants()
    assert pool.num_orphans == 1
    pool.register([BlockKey(name(1))], pool.allocate(1).slots)
    assert pool.num_orphans == 0
    assert len(pool.find_prefix([BlockKey(name(number)) for number in (1, 2, 3)])) == 3
    pool.check_invariants()


def test_a_ring_of_damaged_records_does_not_hang_a_restart(caplog):
    pool = BlockPool(4)
    recover(pool, recovered([1, 2, 3, 4], [2, 1, 2, 0], [0, 1, 2, 3]))
    pool.check_invariants()
    assert pool.keys() == [name(4)]
    assert "3 blocks on disk" in caplog.text


@pytest.mark.slow
def test_a_hundred_thousand_blocks_in_a_bad_order_take_no_time():
    parent = np.arange(-64, 100_000 - 64)
    parent[:64] = NO_PARENT
    order = order_recovered(parent).order
    assert order[0] == 100_000 - 64
    assert len(order) == 100_000
