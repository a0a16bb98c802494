"""Replaying a trace through one tier's books: the pool and the policies that a cache runs, without the bytes.

What is driven here is `dynamo.kvcache.pool.BlockPool`, as sequences and offloads drive it, for each request in turn as if it
ended before the next one began: what is there of the chain is acquired; of the rest, as much as admission lets in gets slots,
for which the pool evicts, and is registered; then the chain is released for its use.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.admission import AdmissionPolicy
from dynamo.kvcache.eviction import EvictionOrder, Use
from dynamo.kvcache.pool import BlockPool
from dynamo.kvcache.reuse import ReuseTracker
from dynamo.perf.trace_chains import Chains, TableHistory

__all__ = ["MakeAdmission", "MakeOrder", "Replay", "TraceTime", "hits_by_tier", "replay"]

MakeOrder = Callable[[ReuseTracker], EvictionOrder]
MakeAdmission = Callable[[ReuseTracker, EvictionOrder], AdmissionPolicy]

_TIER = "tier"


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of it.

    Attributes:
        found: leading blocks of each request that were there when it came, int64 [number of requests].
        num_written: blocks that were taken in.
        cpu_s: processor time of the replay, without the tracker's.
    """

    found: npt.NDArray[np.int64]
    num_written: int
    cpu_s: float

    @property
    def num_hits(self) -> int:
        """Blocks found, of all requests."""
        return int(self.found.sum())


class TraceTime:
    """An order that is asked at the trace's time, whatever the pool's clock says. Implements EvictionOrder."""

    def __init__(self, order: EvictionOrder) -> None:
        self.now_s = 0.0
        self._order = order

    def add(self, entry: int, use: Use, num_blocks: int) -> None:
        """As the order's."""
        self._order.add(entry, use, num_blocks)

    def remove(self, entry: int) -> None:
        """As the order's."""
        self._order.remove(entry)

    def candidates(self, now_s: float) -> Iterator[int]:
        """Those of the moment the trace is at."""
        return self._order.candidates(self.now_s)


def replay(
    chains: Chains, num_slots: int, make_order: MakeOrder, make_admission: MakeAdmission, *, is_tracked: bool = True
) -> Replay:
    """Replays the trace through one tier.

    Args:
        make_order: makes the order of eviction.
        make_admission: makes the policy of admission, given the order.
        is_tracked: whether the pool is told what the tracker knows of the uses; a cache with LRU has no tracker.
    """
    begun = time.thread_time()
    history = TableHistory(chains.requests[0].tables)
    order = make_order(history)
    admission = make_admission(history, order)
    at_trace_time = TraceTime(order)
    pool = BlockPool(num_slots, at_trace_time)
    found: list[int] = []
    num_written = 0
    for chain in chains.requests:
        history.show(chain.tables)
        at_trace_time.now_s = chain.time_s
        keys, use = chain.keys, chain.use if is_tracked else chain.bare_use
        slots = pool.find_prefix(keys)
        num_found = len(slots)
        found.append(num_found)
        pool.acquire(slots)
        wanted = len(keys) - num_found
        if wanted:
            wanted = min(admission.admit(_TIER, keys, use, wanted), pool.num_available)
        room = pool.allocate(wanted) if wanted else None
        if room is not None:
            end = num_found + wanted
            pool.register(keys[num_found:end], room.slots, keys[num_found - 1] if num_found else None)
            slots = np.concatenate((slots, room.slots))
            num_written += wanted
        pool.release(slots, use)
    return Replay(np.array(found, dtype=np.int64), num_written, time.thread_time() - begun)


def hits_by_tier(tiers: Sequence[Replay]) -> list[int]:
    """Blocks that each of several tiers delivers, given each tier's own replay, the fastest first.

    A block is delivered by the fastest tier that holds it, if each block before it is held by one. The tiers do not disturb
    one another: each is offered every chain and files every use, wherever its blocks came from. So the tiers of a cache are
    replayed one by one.
    """
    hits: list[int] = []
    reached = np.zeros_like(tiers[0].found)
    for tier in tiers:
        further = np.maximum(reached, tier.found)
        hits.append(int((further - reached).sum()))
        reached = further
    return hits
