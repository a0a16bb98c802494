"""Takes many blocks out of a pool in pieces, so that nobody waits long for the pool's lock, and tells of each piece."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.pool import BlockPool
from dynamo.tiers.tier import SlotIds

__all__ = ["RecordDrop", "clear_pool", "forget_behind"]

RecordDrop = Callable[[list[BlockKey], SlotIds], None]
"""Told of blocks that are gone, and the slots they lay in; called without the lock."""

_TURN_S = 0.001
_PAUSE_S = 0.0003  # locks are not fair: without it, whoever gave the lock back is the first to have it again
_MIN_BLOCKS, _FIRST_BLOCKS, _MAX_BLOCKS = 16, 256, 16384


def clear_pool(
    pool: BlockPool, lock: Condition, events: EventLog, tier: str, record_drop: RecordDrop | None = None
) -> None:
    """Evicts as many blocks as are idle now, those first that have been so for longest.

    Args:
        lock: guards the pool; held for about a millisecond at a time.
        events: told of each piece, and that the tier is cleared when the last piece leaves nothing.
    """
    pace = _Pace(lock)
    num_left = pool.num_idle
    is_done = False
    while not is_done:
        with pace.turn() as num_blocks:
            removed, slots = pool.evict_idle(min(num_blocks, num_left))
            num_left -= len(removed)
            is_done = num_left <= 0 or not pool.num_idle
            if is_done and not len(pool):
                events.cleared(tier)
            else:
                events.removed(tier, removed)
        if record_drop:
            record_drop(removed, slots)


def forget_behind(
    pool: BlockPool,
    num_slots: int,
    lock: Condition,
    events: EventLog,
    tier: str,
    record_drop: RecordDrop | None = None,
) -> None:
    """Empties a pool's slots from `num_slots` on before it is made smaller, and forgets the blocks that continue theirs.

    In use or not. The slots are withheld, until `BlockPool.resize` takes them away; what is written into those in use
    meanwhile is left to it.
    """
    with lock:
        find = pool.slots_behind(num_slots)
    going = find()
    pace = _Pace(lock)
    start = 0
    while start < len(going):
        with pace.turn() as num_blocks:
            removed, slots = pool.forget_slots(going[start : start + num_blocks], "resized")
            pool.withhold(num_slots)
            events.removed(tier, removed)
        start += num_blocks
        if record_drop:
            record_drop(removed, slots)


class _Pace:
    """Turns with a lock that take about a millisecond each, whatever a block costs. For one thread."""

    def __init__(self, lock: Condition) -> None:
        self._lock = lock
        self._num_blocks = _FIRST_BLOCKS
        self._is_first = True

    @contextmanager
    def turn(self) -> Iterator[int]:
        """Holds the lock for the block of code, which deals with as many blocks as it is given, at most."""
        if not self._is_first:
            time.sleep(_PAUSE_S)
        self._is_first = False
        with self._lock:
            started_s = time.perf_counter()
            yield self._num_blocks
            share = (time.perf_counter() - started_s) / _TURN_S
        self._num_blocks = max(_MIN_BLOCKS, min(_MAX_BLOCKS, int(self._num_blocks / max(share, 0.25))))
