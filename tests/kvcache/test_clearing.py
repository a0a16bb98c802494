"""Emptying a large pool piece by piece while others want its lock."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from dynamo.kvcache.clearing import clear_pool, forget_behind
from dynamo.kvcache.events import Cleared, EventLog, Removed
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.pool import BlockPool
from dynamo.tiers.tier import SlotIds

CHAIN = 100


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "little"))


def fill(pool: BlockPool) -> None:
    for first in range(0, pool.num_slots, CHAIN):
        room = pool.allocate(CHAIN)
        assert room is not None
        pool.release(pool.register([key(first + i) for i in range(CHAIN)], room.slots).slots)


def removed_keys(events: EventLog) -> list[BlockKey]:
    return [key for event in events.read(-1) if isinstance(event, Removed) for key in event.keys]


@pytest.fixture
def pool() -> BlockPool:
    pool = BlockPool(3000)
    fill(pool)
    return pool


@pytest.fixture
def recorded() -> list[tuple[BlockKey, int]]:
    return []


@pytest.fixture
def record(recorded: list[tuple[BlockKey, int]]) -> Callable[[list[BlockKey], SlotIds], None]:
    return lambda keys, slots: recorded.extend(zip(keys, slots.tolist(), strict=True))


def test_every_piece_is_told_and_the_last_one_clears(
    pool: BlockPool, record: Callable[..., None], recorded: list[tuple[BlockKey, int]]
) -> None:
    events = EventLog()
    clear_pool(pool, threading.Condition(), events, "disk", record)
    pool.check_invariants()
    assert len(pool) == 0
    *pieces, last = events.read(-1)
    assert len(pieces) > 1
    assert isinstance(last, Cleared)
    assert len({key for key, _ in recorded}) == len({slot for _, slot in recorded}) == 3000
    assert set(removed_keys(events)) < {key for key, _ in recorded}


def test_with_a_block_in_use_nothing_is_said_to_be_cleared(pool: BlockPool) -> None:
    events = EventLog()
    slots = pool.find_prefix([key(0), key(1)])
    pool.acquire(slots)
    clear_pool(pool, threading.Condition(), events, "host")
    assert pool.keys() == [key(0), key(1)]
    assert all(isinstance(event, Removed) for event in events.read(-1))
    assert sorted(removed_keys(events)) == sorted(key(i) for i in range(2, 3000))
    pool.check_invariants()


def test_an_empty_pool_is_cleared_all_the_same() -> None:
    events = EventLog()
    clear_pool(BlockPool(3), threading.Condition(), events, "host")
    assert [type(event) for event in events.read(-1)] == [Cleared]


def test_others_get_the_lock_in_between_and_what_they_add_stays() -> None:
    pool = BlockPool(40_000)
    fill(pool)
    lock = threading.Condition()
    clearing = threading.Thread(target=clear_pool, args=(pool, lock, EventLog(), "host"))
    num_turns = 0
    sizes = []
    clearing.start()
    while clearing.is_alive():
        with lock:
            num_turns += 1
            sizes.append(len(pool))
            if num_turns == 3 and pool.num_free:
                room = pool.allocate(1)
                assert room is not None
                pool.release(pool.register([key(1 << 40)], room.slots).slots)
        time.sleep(0)
    clearing.join(20)
    assert len(set(sizes)) > 3, "the pool was seen half empty"
    assert pool.keys() in ([key(1 << 40)], [])
    pool.check_invariants()


@pytest.mark.parametrize("is_scattered", [False, True])
def test_slots_that_go_are_emptied_with_what_continues_their_blocks(
    is_scattered: bool, record: Callable[..., None], recorded: list[tuple[BlockKey, int]]
) -> None:
    pool = BlockPool(3000)
    slots = np.arange(3000)
    if is_scattered:
        slots = np.random.default_rng(0).permutation(slots)
    pool.allocate(3000)
    for first in range(0, 3000, CHAIN):
        pool.register([key(first + i) for i in range(CHAIN)], slots[first : first + CHAIN])
    for first in range(0, 3000, CHAIN):
        pool.release(slots[first : first + CHAIN])
    stay = {
        key(first + i)
        for first in range(0, 3000, CHAIN)
        for i in range(CHAIN)
        if (slots[first : first + i + 1] < 2000).all()
    }
    events = EventLog()
    forget_behind(pool, 2000, threading.Condition(), events, "disk", record)
    assert set(pool.keys()) == stay
    assert sorted(removed_keys(events)) == sorted(key for key, _ in recorded)
    assert len(recorded) == 3000 - len(stay)
    assert pool.num_orphans == 0
    assert pool.resize(2000)[0] == []
    pool.check_invariants()
    assert pool.num_available == 2000
