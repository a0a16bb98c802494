import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from dynamo.kvcache.eviction import Use
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


class Favourites:
    """Orders entries by the numbers of their uses, as a list says."""

    def __init__(self, uses_in_order: list[int]) -> None:
        self.ranks = {use: rank for rank, use in enumerate(uses_in_order)}
        self.entries: dict[int, int] = {}

    def add(self, entry: int, use: Use, num_blocks: int) -> None:
        assert entry not in self.entries
        self.entries[entry] = use.number

    def remove(self, entry: int) -> None:
        del self.entries[entry]

    def candidates(self, now_s: float) -> Iterator[int]:
        return iter(sorted(self.entries, key=lambda entry: (self.ranks[self.entries[entry]], entry)))


def use_chain(pool: BlockPool, numbers: list[int], use: int, **known: int) -> np.ndarray:
    """Finds the beginning of a chain, registers the rest, and lets go of it."""
    keys = [key(number) for number in numbers]
    matched = pool.find_prefix(keys)
    pool.acquire(matched)
    rest = keys[len(matched) :]
    fresh = pool.allocate(len(rest)).slots
    fresh = pool.register(rest, fresh, keys[len(matched) - 1] if len(matched) else None).slots
    slots = np.concatenate((matched, fresh))
    pool.release(slots, Use(use, 0.0, **known))
    return slots


def test_a_block_is_not_evicted_before_those_that_continue_it_whatever_the_order():
    pool = BlockPool(6, Favourites([2, 1]))
    use_chain(pool, [1, 2, 3, 4], use=1)
    use_chain(pool, [1, 2, 13, 14], use=2)  # takes the prefix with it, and goes first
    assert pool.allocate(3).evicted_keys == [key(14), key(13), key(4)]
    assert pool.allocate(2).evicted_keys == [key(3), key(2)]
    pool.check_invariants()


def test_an_entry_passed_over_has_its_turn_as_soon_as_it_has_a_leaf():
    pool = BlockPool(6, Favourites([3, 2, 1]))
    use_chain(pool, [1, 2, 3], use=1)
    use_chain(pool, [1, 11], use=2)
    use_chain(pool, [21, 22], use=2)
    use_chain(pool, [1], use=3)
    assert pool.allocate(3).evicted_keys == [key(11), key(22), key(21)]
    assert pool.allocate(2).evicted_keys == [key(3), key(2)]
    assert pool.allocate(1).evicted_keys == [key(1)]
    pool.check_invariants()


def test_what_continues_a_lost_block_is_found_again_when_that_is_back():
    pool = BlockPool(6, Favourites([1, 2]))
    use_chain(pool, [1, 2, 3, 4], use=2)
    pool.forget([key(2)])
    assert pool.num_orphans == 1
    pool.check_invariants()
    use_chain(pool, [1, 2], use=1)
    assert pool.num_orphans == 0
    assert len(pool.find_prefix([key(n) for n in (1, 2, 3, 4)])) == 4
    assert pool.allocate(3).evicted_keys == [key(4)]
    assert pool.allocate(1).evicted_keys == [key(3)]
    pool.check_invariants()


def test_blocks_may_come_in_any_order():
    pool = BlockPool(4)
    slots = pool.allocate(4).slots
    keys = [key(n) for n in (3, 4, 2, 1)]
    pool.register(keys[:2], slots[:2], parents=[key(2), key(3)])
    pool.release(slots[:2])
    pool.register(keys[2:], slots[2:], parents=[key(1), None])
    pool.release(slots[2:])
    pool.check_invariants()
    assert pool.num_orphans == 0
    assert pool.allocate(4).evicted_keys == [key(4), key(3), key(2), key(1)]


def test_a_beginning_that_is_held_up_by_a_held_end_goes_last():
    pool = BlockPool(4)
    slots = pool.allocate(4).slots
    pool.register([key(1), key(2), key(3)], slots[:3])
    pool.release(slots[:2])
    pool.register([key(4)], slots[3:])
    pool.release(slots[3:])
    assert pool.allocate(1).evicted_keys == [key(4)]
    assert pool.allocate(2).evicted_keys == [key(2), key(1)]
    assert pool.num_orphans == 1
    pool.check_invariants()


def test_blocks_stay_with_the_latest_use_that_filed_them():
    pool = BlockPool(6)
    shared = use_chain(pool, [1, 2], use=1)
    other = use_chain(pool, [11, 12], use=1)
    pool.touch(shared, Use(2, 0.0))
    pool.touch(np.concatenate((shared, other)), Use(1, 0.0, num_output_tokens=9))  # late news of an older use
    assert pool.explain(key(2)).use == Use(2, 0.0)
    assert pool.explain(key(12)).use == Use(1, 0.0, num_output_tokens=9)
    pool.touch(other, Use(1, 0.0))  # later still, and it knows less
    assert pool.explain(key(12)).use == Use(1, 0.0, num_output_tokens=9)
    pool.touch(shared)
    assert pool.explain(key(2)).use.number == 0


def test_a_pool_explains_where_a_block_is_and_why_not():
    pool = BlockPool(4)
    slots = use_chain(pool, [1, 2], use=7)
    use_chain(pool, [11, 12], use=8)
    place = pool.explain(key(11))
    assert (place.num_users, place.num_children, place.is_orphan, place.use.number) == (0, 1, False, 8)
    pool.acquire(slots)
    held = pool.explain(key(1))
    assert (held.slot, held.num_users, held.use) == (slots[0], 1, None)
    pool.allocate(1)
    pool.forget([key(11)])
    assert pool.explain(key(12)).reason == "evicted"
    assert pool.explain(key(11)).reason == "lost"
    assert pool.explain(key(99)) is None


def test_a_pool_shrinks_while_it_is_used():
    pool = BlockPool(8)
    idle = use_chain(pool, [1, 2, 3], use=1)
    used = pool.register([key(n) for n in (11, 12, 13, 14)], pool.allocate(4).slots).slots
    assert max(idle) < 4 <= max(used)
    keys, slots = pool.resize(4)
    assert sorted(keys) == sorted(key(n) for n in (12, 13, 14))
    assert sorted(slots.tolist()) == [4, 5, 6]
    assert pool.num_leaving == 3
    assert pool.allocate(2) is not None
    assert pool.num_free == 0
    pool.check_invariants()
    pool.release(used)
    assert pool.num_leaving == 0
    assert pool.num_available == 2
    pool.check_invariants()
    assert pool.allocate(3) is None


def test_shrinking_takes_what_continues_a_block_that_goes():
    pool = BlockPool(6)
    slots = pool.allocate(6).slots[::-1]
    pool.register([key(n) for n in range(6)], slots)
    pool.release(slots)
    keys, _ = pool.resize(5)
    assert len(keys) == 6
    assert pool.num_available == 5
    pool.check_invariants()


def test_what_is_written_into_slots_that_go_is_not_found():
    pool = BlockPool(6)
    slots = pool.allocate(6).slots
    pool.resize(3)
    registered = pool.register([key(n) for n in range(6)], slots)
    assert registered.slots.tolist() == slots.tolist()
    assert list(registered.new) == [0, 1, 2]
    pool.release(registered.slots)
    pool.check_invariants()
    assert (len(pool), pool.num_available, pool.num_leaving) == (3, 3, 0)
    assert len(pool.allocate(3).slots) == 3


def test_slots_behind_are_told_each_before_its_parent():
    pool = BlockPool(8)
    slots = pool.allocate(6).slots[[0, 5, 1, 4, 2]]
    pool.register([key(n) for n in range(5)], slots)  # a chain through slots 0, 5, 1, 4, 2
    assert pool.slots_behind(5)().tolist()[:4] == [2, 4, 1, 5]
    assert sorted(pool.slots_behind(5)().tolist()) == [1, 2, 4, 5, 6, 7]
    assert sorted(pool.slots_behind(8)().tolist()) == []


def test_evicting_idle_blocks_by_and_by_leaves_prefixes_whole():
    pool = BlockPool(12)
    use_chain(pool, list(range(6)), use=1)
    use_chain(pool, [*range(3), 10, 11, 12], use=2)
    assert pool.evict_idle(0)[0] == []
    assert sorted(pool.evict_idle(3)[0]) == [key(n) for n in (3, 4, 5)]
    assert pool.evict_idle(2)[0] == [key(12), key(11)]
    pool.check_invariants()
    assert len(pool.evict_idle(100)[0]) == pool.num_evicted - 5 == 4
    assert len(pool) == 0
    assert pool.explain(key(4)).reason == "cleared"
    pool.check_invariants()


def test_all_blocks_are_forgotten_at_once():
    pool = BlockPool(8)
    use_chain(pool, [1, 2, 3], use=1)
    used = pool.register([key(n) for n in (11, 12)], pool.allocate(2).slots).slots
    lost = pool.forget_all()
    assert sorted(lost) == [key(n) for n in (1, 2, 3, 11, 12)]
    assert (len(pool), pool.num_available, pool.num_pinned) == (0, 6, 2)
    assert pool.explain(key(12)).reason == "lost"
    pool.check_invariants()
    pool.release(used)
    assert pool.num_free == 8
    use_chain(pool, list(range(8)), use=2)
    pool.check_invariants()


def test_a_block_that_is_known_is_shared_by_who_computed_it_in_a_slot_that_a_resize_took_away():
    pool = BlockPool(8)
    lower, upper = pool.allocate(4).slots, pool.allocate(4).slots
    pool.resize(4)
    kept = pool.register([key(1)], lower[:1]).slots
    shared = pool.register([key(1), key(2)], upper[2:]).slots
    assert shared.tolist() == [*kept.tolist(), upper[3]]
    pool.release(np.concatenate((lower, upper[:2], shared)))
    pool.check_invariants()
    assert pool.find(key(1)) == kept[0]
    assert pool.find(key(2)) is None


@pytest.mark.parametrize("known", [0, 1])
def test_blocks_that_arrive_in_slots_that_a_resize_took_away_are_not_findable(known):
    pool = BlockPool(8)
    cached_chain(pool, list(range(known)))
    slots = pool.allocate(8 - known).slots
    pool.resize(4)
    pool.release(pool.register([key(n) for n in range(8 - known)], slots).slots)
    pool.check_invariants()
    assert all(pool.find(key(n)) in (None, 0, 1, 2, 3) for n in range(8))
    assert pool.num_leaving == 0
    pool.resize(8)
    pool.check_invariants()
    assert sorted(pool.allocate(8).slots.tolist()) == list(range(8))


def test_a_pool_grows_again_even_before_it_has_shrunk():
    pool = BlockPool(4)
    slots = pool.register([key(n) for n in range(4)], pool.allocate(4).slots).slots
    pool.resize(2)
    assert pool.resize(8) == ([], pytest.approx([]))
    pool.check_invariants()
    assert pool.num_available == 4
    pool.release(slots)
    assert pool.num_available == 8
    assert len(pool) == 2
    use_chain(pool, list(range(100, 108)), use=1)
    pool.check_invariants()


def test_slots_taken_away_before_their_blocks_are_registered_are_not_found():
    pool = BlockPool(8)
    slots = pool.allocate(8).slots
    pool.resize(4)
    keys = [key(n) for n in range(8)]
    registered = pool.register(keys, slots)
    assert list(registered.new) == [0, 1, 2, 3]
    assert registered.slots.tolist() == slots.tolist()
    assert len(pool) == 4
    pool.release(registered.slots)
    assert pool.num_leaving == 0
    pool.check_invariants()
    pool.resize(8)
    assert len(pool.allocate(8).slots) == 8
    pool.check_invariants()


class Shuffled:
    """An order without rhyme or reason."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.entries: set[int] = set()

    def add(self, entry: int, use: Use, num_blocks: int) -> None:
        assert entry not in self.entries
        self.entries.add(entry)

    def remove(self, entry: int) -> None:
        self.entries.remove(entry)

    def candidates(self, now_s: float) -> Iterator[int]:
        self.seed += 1
        return iter(random.Random(self.seed).sample(sorted(self.entries), len(self.entries)))


def chain_keys(chain: int, length: int) -> list[BlockKey]:
    """Chains 2k and 2k + 1 share their first two blocks."""
    return [key(100 * (chain // 2 * 2) + i + 1 if i < 2 else 100 * chain + i + 1) for i in range(length)]


PARENTS = {
    child: parent
    for chain in range(4)
    for child, parent in zip(chain_keys(chain, 6)[1:], chain_keys(chain, 5), strict=True)
}


class PoolMachine(RuleBasedStateMachine):
    """Random use of a small pool by holders that keep the chain discipline, beside a plain model of what is cached."""

    held = Bundle("held")
    computing = Bundle("computing")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.is_lru = True
        self.last_use: dict[BlockKey, int] = {}  # of blocks that may be cached; a parent's is never below its child's
        self.clock = 0
        self.holders: Counter[int] = Counter()  # of slots
        self.forgotten: set[BlockKey] = set()

    @initialize(seed=st.none() | st.integers(0, 2**32))
    def choose_order(self, seed):
        if seed is not None:
            self.pool, self.is_lru = BlockPool(12, Shuffled(seed)), False

    @rule(target=computing, chain=st.integers(0, 3), length=st.integers(1, 6))
    def open(self, chain, length):
        """Pins a cached prefix and reserves slots for the rest, as a sequence does."""
        keys = chain_keys(chain, length)
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
            assert not self.is_lru or all(self.last_use[gone] <= self.last_use[other] for other in kept)
            for child, parent in PARENTS.items():
                assert parent != gone or child not in self.pool or self.holders[self.pool.find(child)]
        return (keys, matched, room.slots)

    @rule(target=held, sequence=consumes(computing))
    def commit(self, sequence):
        """Computed blocks become findable, as far as their slots were not taken away meanwhile."""
        keys, matched, fresh = sequence
        parent = keys[len(matched) - 1] if len(matched) else None
        slots = np.concatenate((matched, self.pool.register(keys[len(matched) :], fresh, parent).slots))
        assert len(set(slots.tolist())) == len(keys)
        self.forgotten.update(k for k in keys if k not in self.pool)
        self.clock += 1
        self.last_use.update(dict.fromkeys(keys, self.clock))
        self.holders.update(slots[len(matched) :].tolist())
        return (keys, slots)

    @rule(sequence=consumes(computing))
    def abandon(self, sequence):
        """A sequence ends before its blocks are computed."""
        keys, matched, fresh = sequence
        self.clock += 1
        self.last_use.update(dict.fromkeys(keys[: len(matched)], self.clock))
        self.holders.subtract(matched.tolist())
        self.pool.release(np.concatenate((matched, fresh)))

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

    @rule(chain=st.integers(0, 3), depth=st.integers(1, 6), with_rest=st.booleans())
    def forget(self, chain, depth, with_rest):
        """Corruption, of one block or of all from there on."""
        keys = chain_keys(chain, 6)[depth - 1 : None if with_rest else depth]
        self.pool.forget(keys)
        self.forgotten.update(keys)

    @rule(num_slots=st.integers(4, 16))
    def resize(self, num_slots):
        keys, _ = self.pool.resize(num_slots)
        self.forgotten.update(keys)
        assert not self.pool.find_any(keys).size

    @rule(chain=st.integers(0, 3))
    def touch(self, chain):
        keys = chain_keys(chain, 6)
        slots = self.pool.find_prefix(keys)
        self.clock += 1
        for k, slot in zip(keys, slots.tolist(), strict=False):
            if not self.holders[slot]:
                self.last_use[k] = self.clock
        self.pool.touch(slots)

    @rule(count=st.integers(0, 16))
    def evict(self, count):
        before = self.pool.num_idle
        keys, slots = self.pool.evict_idle(count)
        assert len(keys) == len(slots) == min(count, before)
        assert self.pool.num_idle == before - len(keys)
        for gone in keys:
            for child, parent in PARENTS.items():
                assert parent != gone or child not in self.pool or self.holders[self.pool.find(child)]

    @rule()
    def lose(self):
        lost = self.pool.forget_all()
        self.forgotten.update(lost)
        assert len(self.pool) == 0
        assert self.pool.num_idle == 0

    @rule(num_slots=st.integers(4, 16))
    def forget_behind(self, num_slots):
        slots = self.pool.slots_behind(num_slots)()
        assert {*range(num_slots, self.pool.num_slots)} <= {*slots.tolist()}
        keys, _ = self.pool.forget_slots(slots, "resized")
        self.forgotten.update(keys)

    @invariant()
    def books_balance(self):
        self.pool.check_invariants()
        lost = [child for child, parent in PARENTS.items() if child in self.pool and parent not in self.pool]
        assert len(lost) == self.pool.num_orphans
        assert self.forgotten or not lost, "a block was evicted before those that continue it"


TestPoolMachine = pytest.mark.slow(PoolMachine.TestCase)
