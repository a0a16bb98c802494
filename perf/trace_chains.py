"""A trace made ready for many replays: what the tracker says of each request, asked once.

What the tracker tells does not depend on any cache. So it is asked in the order of time, before all replays, and each of them
sees at each request the tables that the tracker had at that moment.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo.kvcache.eviction import Use
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.hazards import ReuseTables
from dynamo.kvcache.reuse import ReuseTracker
from dynamo.perf.trace_log import TracedRequest

__all__ = ["Chains", "RequestChain", "TableHistory", "prepare"]


@dataclass(frozen=True, slots=True)
class RequestChain:
    """A request as the cache sees it.

    Attributes:
        time_s: when it came; the trace's first request comes at 0.
        keys: of all its blocks.
        use: what the tracker knows of it when it ends.
        bare_use: the same where there is no tracker.
        tables: what the tracker had learned when it came.
    """

    time_s: float
    keys: list[BlockKey]
    use: Use
    bare_use: Use
    tables: ReuseTables


@dataclass(frozen=True, slots=True)
class Chains:
    """The whole trace.

    Attributes:
        num_references: blocks of all requests.
        num_unique: different blocks.
        block_tokens: tokens of a block.
        tracker_cpu_s: processor time that the tracker took.
    """

    requests: Sequence[RequestChain]
    num_references: int
    num_unique: int
    block_tokens: int
    tracker_cpu_s: float

    @property
    def duration_s(self) -> float:
        """From the first request to the last."""
        return self.requests[-1].time_s - self.requests[0].time_s


class TableHistory(ReuseTracker):
    """Stands in for the tracker in a replay: `tables` are those of the request that is being replayed."""

    def __init__(self, first: ReuseTables) -> None:
        super().__init__(max_marks=1, max_waiting=1)
        self._tables = first

    def show(self, tables: ReuseTables) -> None:
        """Moves to another moment."""
        self._tables = tables


def prepare(requests: Sequence[TracedRequest]) -> Chains:
    """Asks the tracker about each request.

    Args:
        requests: at least one, in order of time.
    """
    names: dict[int, BlockKey] = {}
    named: list[list[BlockKey]] = []
    for request in requests:
        for key in request.keys:
            if key not in names:
                names[key] = BlockKey(key.to_bytes(16, "little"))
        named.append([names[key] for key in request.keys])
    tracker = ReuseTracker()
    chains: list[RequestChain] = []
    begun = time.thread_time()
    for request, keys in zip(requests, named, strict=True):
        tables = tracker.tables
        use = tracker.observe(
            keys[: request.num_prompt_blocks], request.time_s, num_prompt_tokens=request.num_prompt_tokens
        )
        use = tracker.finish(use, keys, request.num_output_tokens)
        bare_use = Use(
            use.number, use.time_s, num_prompt_tokens=use.num_prompt_tokens, num_output_tokens=use.num_output_tokens
        )
        chains.append(RequestChain(request.time_s, keys, use, bare_use, tables))
    return Chains(
        requests=chains,
        num_references=sum(map(len, named)),
        num_unique=len(names),
        block_tokens=requests[0].block_tokens,
        tracker_cpu_s=time.thread_time() - begun,
    )
