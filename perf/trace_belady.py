"""The bound: how many blocks the best possible cache, which knows the future, would find."""

import heapq
from collections.abc import Sequence

from dynamo.kvcache.hashing import BlockKey
from dynamo.perf.trace_chains import Chains

__all__ = ["Belady"]


class Belady:
    """Belady's MIN over a trace, for tiers of any size.

    Blocks between two places where chains begin, branch or end always come and go in order, so it is enough to count *runs*
    of blocks: of each run a leading part is resident.
    """

    def __init__(self, chains: Chains) -> None:
        """Takes the trace apart into runs, and looks up when each is used next."""
        tree = _Tree([chain.keys for chain in chains.requests])
        self._lengths = tree.lengths
        self._paths = tree.paths
        self._never = len(self._paths)
        upcoming = [self._never] * len(self._lengths)
        self._next_uses: list[list[int]] = []
        for number in range(self._never - 1, -1, -1):
            runs = self._paths[number]
            self._next_uses.append([upcoming[run] for run in runs])
            for run in runs:
                upcoming[run] = number
        self._next_uses.reverse()

    def hits(self, capacity: int) -> int:
        """Hits of the best possible cache of `capacity` blocks: an upper bound for every policy.

        MIN with bypass over the sequence of single blocks: each new block is stored, then those go whose next use is farthest
        away, the new ones included. A block is used whenever one of its descendants is, so its next use is never later than
        theirs, and taking the deepest of equals first keeps whole prefixes: among the optima for single blocks is one that
        is leaf-first, and it is the optimum of prefix hits too.
        """
        lengths = self._lengths
        resident, next_use = [0] * len(lengths), [self._never] * len(lengths)
        heap: list[tuple[int, int, int]] = []  # minus next use, minus depth, run
        num_resident = hits = 0
        for runs, following in zip(self._paths, self._next_uses, strict=True):
            for run in runs:
                hits += resident[run]
                if resident[run] < lengths[run]:
                    break
            for depth, (run, upcoming_use) in enumerate(zip(runs, following, strict=True)):
                num_resident += lengths[run] - resident[run]
                resident[run] = lengths[run]
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


class _Tree:
    """All chains as paths of runs."""

    def __init__(self, chains: Sequence[Sequence[BlockKey]]) -> None:
        self.lengths: list[int] = []  # blocks of each run
        self._run_at: dict[BlockKey, int] = {}  # key of a run's first block -> run
        self._children: dict[BlockKey, int] = {}  # key -> how many different blocks follow it
        self._ends = {keys[-1] for keys in chains if keys}
        known: set[BlockKey] = set()
        for keys in chains:
            for i, key in enumerate(keys):
                if key not in known:
                    known.add(key)
                    if i:
                        self._children[keys[i - 1]] = self._children.get(keys[i - 1], 0) + 1
        self.paths = [self._path(keys) for keys in chains]

    def _path(self, keys: Sequence[BlockKey]) -> list[int]:
        path: list[int] = []
        start = 0
        while start < len(keys):
            run = self._run_at.get(keys[start])
            if run is None:
                end = start + 1
                while end < len(keys) and not self._is_end(keys[end - 1]):
                    end += 1
                run = len(self.lengths)
                self._run_at[keys[start]] = run
                self.lengths.append(end - start)
            path.append(run)
            start += self.lengths[run]
        return path

    def _is_end(self, key: BlockKey) -> bool:
        return key in self._ends or self._children.get(key, 0) != 1
