from collections import Counter

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.lineage import NO_PARENT
from dynamo.kvcache.pool import BlockPool


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "little"))


def cached_chain(pool: BlockPool, numbers: list[int]) -> np.ndarray:
    room = pool.allocate(len(numbers))
    assert room is not None
    slots = pool.register([key(n) for n in numbers], room.slots).slots
    pool.release(slots)
    return slots


def test_slots_are_given_in_ascending_order_so_that_copies_merge():
    assert BlockPool(8).allocate(5).slots.tolist() == [0, 1, 2, 3, 4]


def test_allocation_is_all_or_nothing():
    pool = BlockPool(4)
    pool.allocate(3)
    assert pool.allocate(2) is None
    assert pool.num_available == 1
    pool.check_invariants()


def test_the_tail_of_the_least_recently_used_chain_goes_first():
    pool = BlockPool(6)
    cached_chain(pool, [1, 2, 3])
    cached_chain(pool, [11, 12, 13])
    assert pool.allocate(1).evicted_keys == [key(3)]
    assert pool.allocate(3).evicted_keys == [key(2), key(1), key(13)]


def test_a_shared_prefix_outlives_both_tails():
    pool = BlockPool(5)
    first = cached_chain(pool, [1, 2, 3])
    prefix = pool.find_prefix([key(1), key(2), key(9)])
    pool.acquire(prefix)
    tail = pool.register([key(9)], pool.allocate(1).slots).slots
    pool.release(np.concatenate((prefix, tail)))
    assert first.tolist()[:2] == prefix.tolist()
    assert pool.allocate(4).evicted_keys == [key(3), key(9), key(2)]


def test_touching_moves_a_chain_behind_the_others():
    pool = BlockPool(4)
    old = cached_chain(pool, [1, 2])
    cached_chain(pool, [11, 12])
    pool.touch(old)
    assert pool.allocate(2).evicted_keys == [key(12), key(11)]


def test_blocks_in_use_are_never_evicted():
    pool = BlockPool(2)
    slots = cached_chain(pool, [1, 2])
    pool.acquire(slots[:1])
    assert pool.allocate(2) is None
    assert pool.allocate(1).evicted_keys == [key(2)]


def test_registering_a_known_key_moves_the_reference_and_frees_the_duplicate():
    pool = BlockPool(4)
    first = pool.register([key(1)], pool.allocate(1).slots).slots
    second = pool.allocate(2).slots
    canonical = pool.register([key(1), key(2)], second).slots
    assert canonical.tolist() == [first[0], second[1]]
    assert pool.num_available == 2
    pool.release(first)
    pool.release(canonical)
    pool.check_invariants()
    assert pool.num_pinned == 0


def test_forgotten_blocks_in_use_become_free_when_released():
    pool = BlockPool(3)
    slots = pool.register([key(1), key(2)], pool.allocate(2).slots).slots
    pool.release(slots[1:])
    known, places = pool.forget([key(1), key(2), key(3)])
    assert known == [key(1), key(2)]
    assert places.tolist() == slots.tolist()
    assert pool.num_available == 2
    pool.release(slots[:1])
    assert pool.num_available == 3
    pool.check_invariants()


def test_a_restored_pool_evicts_in_the_order_given():
    pool = BlockPool(5)
    names = np.frombuffer(key(3) + key(1) + key(2), dtype="V16")
    pool.restore(names, np.array([4, 0, 2]), np.full(3, NO_PARENT), [2, 3])
    pool.check_invariants()
    assert pool.find(key(1)) == 0
    assert pool.allocate(4).evicted_keys == [key(3), key(1)]


def test_using_a_full_pool_over_and_over_keeps_its_books_small():
    pool = BlockPool(16)
    slots = cached_chain(pool, list(range(16)))
    for _ in range(1000):
        pool.acquire(slots)
        pool.release(slots)
    pool.check_invariants()
    assert pool.num_places <= 4 * 16 + 1024


class PoolMachine(RuleBasedStateMachine):
    """Random use of a small pool by holders that keep the chain discipline, beside a plain model of what is cached."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.last_use: dict[BlockKey, int] = {}  # of blocks that may be cached; a parent's is never below its child's
        self.clock = 0
        self.holders: Counter[int] = Counter()  # of slots
        self.forgotten: set[BlockKey] = set()

    @rule(target=held, chain=st.integers(0, 3), length=st.integers(1, 6))
    def open(self, chain, length):
        """Pins a cached prefix and computes the rest, as a sequence does."""
        keys = [key(100 * chain + i + 1) for i in range(length)]
        matched = self.pool.find_prefix(keys)
        self.pool.acquire(matched)
        room = self.pool.allocate(length - len(matched))
        if room is None:
            self.pool.release(matched)  # which makes it the last used
            self.clock += 1
            self.last_use.update(dict.fromkeys(keys[: len(matched)], self.clock))
            return multiple()
        self.holders.update(matched.tolist())
        kept = [k for k in self.last_use if k in self.pool and not self.holders[self.pool.find(k)]]
        for gone in room.evicted_keys:
            assert gone not in self.pool
            assert all(self.last_use[gone] <= self.last_use[other] for other in kept)
        slots = np.concatenate((matched, self.pool.register(keys[len(matched) :], room.slots).slots))
        assert len(set(slots.tolist())) == length
        self.clock += 1
        self.last_use.update(dict.fromkeys(keys, self.clock))
        self.holders.update(room.slots.tolist())
        return (keys, slots)

    @rule(sequence=consumes(held))
    def close(self, sequence):
        keys, slots = sequence
        self.clock += 1
        for k, slot in zip(keys, slots.tolist(), strict=True):
            if k in self.pool and self.pool.find(k) == slot:
                self.last_use[k] = self.clock
            else:
                assert k in self.forgotten, "a held block was evicted or moved"
        self.holders.subtract(slots.tolist())
        self.pool.release(slots)

    @rule(target=held, sequence=held)
    def share(self, sequence):
        self.pool.acquire(sequence[1])
        self.holders.update(sequence[1].tolist())
        return sequence

    @rule(chain=st.integers(0, 3), depth=st.integers(1, 6))
    def forget(self, chain, depth):
        """Corruption: one block and, so that chains stay whole, all behind it."""
        keys = [key(100 * chain + i + 1) for i in range(depth - 1, 6)]
        self.pool.forget(keys)
        self.forgotten.update(keys)

    @rule()
    def evict(self):
        self.pool.evict_idle()

    @invariant()
    def books_balance(self):
        self.pool.check_invariants()


TestPoolMachine = pytest.mark.slow(PoolMachine.TestCase)
