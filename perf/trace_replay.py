"""Replaying a trace through simulated tiers: the real policies over runs of blocks instead of slots with bytes.

What `dynamo.kvcache.pool.BlockPool` does, for each request in turn, as if it ended before the next one began: resident blocks
of the chain are taken out of their entries; slots for the others are taken from the tails of the entries that the order names
first, passing over an entry whose tail has descendants in other entries; then each part of the chain is filed as an entry.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynamo.kvcache.admission import AdmissionPolicy, AdmitAlways
from dynamo.kvcache.eviction import EvictionOrder
from dynamo.perf.trace_chains import Chains, PartRuns, RequestChain, TableHistory

__all__ = ["MakeAdmission", "MakeOrder", "Replay", "ReplayedTier", "belady_hits", "replay"]

MakeOrder = Callable[[TableHistory], EvictionOrder]
MakeAdmission = Callable[[TableHistory, Sequence[EvictionOrder]], AdmissionPolicy]


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of it, in blocks, by tier from the fastest on."""

    hits: Sequence[int]
    written: Sequence[int]


class ReplayedTier:
    """One tier: which leading part of each run is resident, and which entry each run belongs to."""

    def __init__(
        self, chains: Chains, name: str, capacity: int, order: EvictionOrder, admission: AdmissionPolicy
    ) -> None:
        self.resident = [0] * len(chains.lengths)  # leading blocks of each run
        self.num_resident = 0
        self.written = 0
        self._name = name
        self._capacity = capacity
        self._order = order
        self._admission = admission
        self._lengths = chains.lengths
        self._parents = chains.parents
        self._owner = [-1] * len(chains.lengths)  # entry
        self._children = [0] * len(chains.lengths)  # runs behind this one of which something is resident
        self._entries: dict[int, list[int]] = {}  # runs of an entry in chain order; those taken by later entries linger
        self._owned: dict[int, int] = {}  # how many of them it still has
        self._next_entry = 0

    def use(self, chain: RequestChain) -> None:
        """The chain is used: what is lacking is written, as far as admission and room allow."""
        resident, lengths = self.resident, self._lengths
        held = 0
        for run in chain.runs:
            if not resident[run]:
                break
            held += resident[run]
            self._take(run)
        keys = chain.request.keys
        lacking = len(keys) - held
        if lacking:
            lacking = self._admission.admit(self._name, keys, chain.use, lacking)
            lacking = min(lacking, self._capacity - held)
            excess = self.num_resident + lacking - self._capacity
            if excess > 0:
                lacking -= excess - self._evict(excess, chain.use.time_s)
            self.written += lacking
            self.num_resident += lacking
            for run in chain.runs:
                if lacking and resident[run] < lengths[run]:
                    more = min(lacking, lengths[run] - resident[run])
                    if not resident[run]:
                        self._count_child(run, 1)
                    resident[run] += more
                    lacking -= more
        for part in chain.parts:
            self._file(part)

    def _file(self, part: PartRuns) -> None:
        runs = [run for run in part.runs if self.resident[run]]
        if runs:
            entry = self._next_entry
            self._next_entry += 1
            for run in runs:
                self._owner[run] = entry
            self._entries[entry] = runs
            self._owned[entry] = len(runs)
            self._order.add(entry, part.use, sum(self.resident[run] for run in runs))

    def _take(self, run: int) -> None:
        """Takes a run out of its entry: its blocks are in use."""
        entry = self._owner[run]
        self._owner[run] = -1
        self._disown(entry)

    def _disown(self, entry: int) -> None:
        self._owned[entry] -= 1
        if not self._owned[entry]:
            del self._owned[entry], self._entries[entry]
            self._order.remove(entry)

    def _count_child(self, run: int, change: int) -> None:
        parent = self._parents[run]
        if parent is not None:
            self._children[parent] += change

    def _evict(self, count: int, now_s: float) -> int:
        """Evicts `count` blocks, or as many as are idle; returns how many."""
        evicted, last = 0, -1
        while evicted < count and last < evicted:  # a second round finds tails whose descendants went in the first
            last = evicted
            emptied: list[int] = []
            for entry in self._order.candidates(now_s):
                evicted += self._evict_from(entry, count - evicted, emptied)
                if evicted == count:
                    break
            for entry in emptied:
                self._disown(entry)
        self.num_resident -= evicted
        return evicted

    def _evict_from(self, entry: int, count: int, emptied: list[int]) -> int:
        runs = self._entries[entry]
        evicted = 0
        while runs and evicted < count:
            run = runs[-1]
            if self._owner[run] != entry:
                runs.pop()
                continue
            if self._children[run]:
                break
            taken = min(count - evicted, self.resident[run])
            self.resident[run] -= taken
            evicted += taken
            if not self.resident[run]:
                runs.pop()
                self._owner[run] = -1
                self._count_child(run, -1)
                emptied.append(entry)
        return evicted


def replay(
    chains: Chains,
    capacities: Sequence[int],
    make_order: MakeOrder,
    make_admission: MakeAdmission,
) -> Replay:
    """Replays the trace through one tier or several, the fastest first.

    A block counts for the fastest tier that holds it, if a tier holds each block before it. A chain is written to all tiers;
    admission is asked by all but the fastest of several, and by a single one.

    Args:
        capacities: blocks of each tier.
        make_order: makes the order of one tier.
        make_admission: makes the policy, given the orders of all tiers. It knows a tier by its number from 0.
    """
    history = TableHistory(chains.requests[0].tables)
    orders = [make_order(history) for _ in capacities]
    always = AdmitAlways()
    admission = make_admission(history, orders)
    tiers = [
        ReplayedTier(chains, str(i), capacity, order, admission if i or len(orders) == 1 else always)
        for i, (capacity, order) in enumerate(zip(capacities, orders, strict=True))
    ]
    hits = [0] * len(tiers)
    residents = [tier.resident for tier in tiers]
    for chain in chains.requests:
        history.show(chain.tables)
        for run in chain.runs:
            reached = 0
            for i, resident in enumerate(residents):
                if resident[run] > reached:
                    hits[i] += resident[run] - reached
                    reached = resident[run]
            if reached < chains.lengths[run]:
                break
        for tier in tiers:
            tier.use(chain)
    return Replay(hits, [tier.written for tier in tiers])


def belady_hits(chains: Chains, capacity: int) -> int:
    """Hits of the best possible cache, which knows the future: an upper bound for every policy here.

    Belady's MIN with bypass over the sequence of single blocks: each new block is stored, then those go whose next use is
    farthest away, the new ones included. A block is used whenever one of its descendants is, so its next use is never later
    than theirs, and taking the deepest of equals first keeps whole prefixes: among the optima for single blocks is one that
    is leaf-first, and it is the optimum of prefix hits too.
    """
    never = len(chains.requests)
    next_uses: list[list[int]] = []
    upcoming = [never] * len(chains.lengths)
    for number in range(len(chains.requests) - 1, -1, -1):
        runs = chains.requests[number].runs
        next_uses.append([upcoming[run] for run in runs])
        for run in runs:
            upcoming[run] = number
    next_uses.reverse()
    resident, next_use = [0] * len(chains.lengths), [never] * len(chains.lengths)
    heap: list[tuple[int, int, int]] = []  # minus next use, minus depth, run
    num_resident = hits = 0
    for chain, following in zip(chains.requests, next_uses, strict=True):
        for run in chain.runs:
            hits += resident[run]
            if resident[run] < chains.lengths[run]:
                break
        for depth, (run, upcoming_use) in enumerate(zip(chain.runs, following, strict=True)):
            num_resident += chains.lengths[run] - resident[run]
            resident[run] = chains.lengths[run]
            next_use[run] = upcoming_use
            heapq.heappush(heap, (-upcoming_use, -depth, run))
        while num_resident > capacity:
            when, _, run = heap[0]
            if next_use[run] != -when or not resident[run]:
                heapq.heappop(heap)
                continue
            taken = min(num_resident - capacity, resident[run])
            resident[run] -= taken
            num_resident -= taken
    return hits
