"""A trace made ready for many replays: its chains as a tree of runs, and what the tracker says of each request.

Blocks between two places where chains begin, branch, end or are taken apart always come and go in order, so a replay needs no
more than *runs* of blocks: of each run a leading part is resident. What the tracker tells does not depend on any cache, so it
is asked once, in the order of time, and replays see at each request the tables it had at that moment.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo.kvcache.eviction import Use
from dynamo.kvcache.hazards import ReuseTables
from dynamo.kvcache.reuse import ReuseTracker, parts
from dynamo.perf.trace_log import TracedRequest

__all__ = ["Chains", "PartRuns", "RequestChain", "TableHistory", "prepare"]


@dataclass(frozen=True, slots=True)
class PartRuns:
    """One part of a request's chain: what a pool files as an entry."""

    use: Use
    runs: Sequence[int]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class RequestChain:
    """A request as a path through the tree."""

    request: TracedRequest
    use: Use
    runs: Sequence[int]
    parts: Sequence[PartRuns]
    tables: ReuseTables


@dataclass(frozen=True, slots=True)
class Chains:
    """The whole trace.

    Attributes:
        lengths: blocks of each run.
        parents: the run before each; None for the first of a chain.
        num_references: blocks of all requests.
        tracker_cpu_s: processor time that the tracker took.
    """

    requests: Sequence[RequestChain]
    lengths: Sequence[int]
    parents: Sequence[int | None]
    num_references: int
    tracker_cpu_s: float

    @property
    def num_unique(self) -> int:
        """Different blocks."""
        return sum(self.lengths)

    @property
    def duration_s(self) -> float:
        """From the first request to the last."""
        return self.requests[-1].request.time_s - self.requests[0].request.time_s


class TableHistory(ReuseTracker):
    """Stands in for the tracker in a replay: `tables` are those of the request that is being replayed."""

    def __init__(self, first: ReuseTables) -> None:
        super().__init__(max_marks=1, max_waiting=1)
        self._tables = first

    def show(self, tables: ReuseTables) -> None:
        """Moves to another moment."""
        self._tables = tables


def prepare(requests: Sequence[TracedRequest]) -> Chains:
    """Asks the tracker about each request and builds the tree."""
    tracker = ReuseTracker()
    uses: list[Use] = []
    tables: list[ReuseTables] = []
    begun = time.thread_time()
    for request in requests:
        tables.append(tracker.tables)
        use = tracker.observe(
            request.keys[: request.num_prompt_blocks], request.time_s, num_prompt_tokens=request.num_prompt_tokens
        )
        uses.append(tracker.finish(use, request.keys, request.num_output_tokens))
    tracker_cpu_s = time.thread_time() - begun
    tree = _Tree(requests, uses)
    chains: list[RequestChain] = []
    for request, use, known in zip(requests, uses, tables, strict=True):
        path, ends = tree.path(request.keys)
        pieces = []
        for start, end, part in parts(use, len(request.keys)):
            first = 0 if start == 0 else ends.index(start) + 1
            pieces.append(PartRuns(part, path[first : ends.index(end) + 1], end - start))
        chains.append(RequestChain(request, use, path, pieces, known))
    return Chains(chains, tree.lengths, tree.parents, sum(len(r.keys) for r in requests), tracker_cpu_s)


class _Tree:
    def __init__(self, requests: Sequence[TracedRequest], uses: Sequence[Use]) -> None:
        self.lengths: list[int] = []
        self.parents: list[int | None] = []
        self._run_at: dict[int, int] = {}  # key of a run's first block -> run
        self._children: dict[int, int] = {}  # key -> how many different blocks follow it
        self._ends: set[int] = set()  # keys of blocks that end a run although one block follows
        known: set[int] = set()
        for request, use in zip(requests, uses, strict=True):
            keys = request.keys
            for i, key in enumerate(keys):
                if key not in known:
                    known.add(key)
                    if i:
                        self._children[keys[i - 1]] = self._children.get(keys[i - 1], 0) + 1
            self._ends.update(keys[end - 1] for _, end, _ in parts(use, len(keys)))

    def path(self, keys: Sequence[int]) -> tuple[list[int], list[int]]:
        """Runs of a chain and, of each, how many blocks of the chain lie before its end."""
        path: list[int] = []
        ends: list[int] = []
        start = 0
        while start < len(keys):
            run = self._run_at.get(keys[start])
            if run is None:
                end = start + 1
                while end < len(keys) and not (
                    keys[end - 1] in self._ends or self._children.get(keys[end - 1], 0) != 1
                ):
                    end += 1
                run = len(self.lengths)
                self._run_at[keys[start]] = run
                self.lengths.append(end - start)
                self.parents.append(path[-1] if path else None)
            path.append(run)
            start += self.lengths[run]
            ends.append(start)
        return path, ends
