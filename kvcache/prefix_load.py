"""Starts to load the prefix that a sequence found in lower tiers, as its planner decides, and stands for that load."""

import time
from collections.abc import Callable

from dynamo.kvcache.load_decision import LoadDecision, LoadQuestion
from dynamo.kvcache.load_watch import LoadWatch
from dynamo.kvcache.onboard import SOURCES, Load, LoadRequest
from dynamo.kvcache.overlap import OverlappedLoad
from dynamo.kvcache.planner import LoadPlanner
from dynamo.kvcache.stats import CacheCounters
from dynamo.kvcache.store import BlockStore

__all__ = ["PrefixLoader", "WaitedLoad"]


class WaitedLoad:
    """A load that the sequence's caller waits for. Used by the sequence's thread; owns the load until `finish`."""

    def __init__(self, load: Load, watch: LoadWatch | None) -> None:
        """`watch`, if any, keeps the load from costing more than it saves."""
        self.load = load
        self._watch = watch

    @property
    def is_ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self.load.is_due

    @property
    def patience_left_s(self) -> float:
        """Seconds until `is_ready`, unless more blocks arrive or the load ends before."""
        return self.load.remaining_s

    @property
    def num_late(self) -> int:
        """Blocks that did not come in time."""
        return self.load.num_blocks - self.load.num_leading if self.load.is_expired else 0

    def wait(self, timeout_s: float | None) -> int:
        """Waits for the load and ends it; see `Transfer.wait`."""
        num_arrived = self.load.wait(timeout_s)
        if self._watch is not None:
            self._watch.settle(num_arrived, gave_up=self.load.is_expired)
        return num_arrived

    def when_ended(self, callback: Callable[[], None]) -> None:
        """See `Transfer.when_ended`."""
        self.load.when_ended(callback)

    def finish(self) -> None:
        """Ends the load, which nobody wants any more."""
        self.load.cancel()


class PrefixLoader:
    """What starting a sequence's load takes. Owns nothing.

    Args:
        planner: decides what is loaded; None: all that can be, however long it takes.
        overlap: the caller computes meanwhile; only with a planner.
        timeout_s: for any load.
    """

    def __init__(
        self,
        store: BlockStore,
        planner: LoadPlanner | None,
        counters: CacheCounters,
        *,
        block_size: int,
        overlap: bool,
        timeout_s: float,
    ) -> None:
        self.store = store
        self.overlap = overlap
        self._planner = planner
        self._counters = counters
        self._block_size = block_size
        self._timeout_s = timeout_s

    def decide(self, question: LoadQuestion) -> tuple[int, LoadDecision | None]:
        """How many of the loadable blocks are to be loaded."""
        if self._planner is None or not question.num_blocks:
            return question.num_blocks, None
        decision = self._planner.plan_overlapped(question) if self.overlap else self._planner.plan(question)
        return decision.num_blocks_to_load, decision

    def start(self, request: LoadRequest, decision: LoadDecision | None) -> WaitedLoad | OverlappedLoad:
        """Starts to load at least one block."""
        patience_s = None if decision is None or self.overlap else decision.patience_s
        started_s = time.perf_counter()
        load = self.store.load(request, self._timeout_s if patience_s is None else min(self._timeout_s, patience_s))
        counters, lowest = self._counters, SOURCES[int(request.sources.max())]
        load.when_ended(lambda: counters.count_load(lowest, time.perf_counter() - started_s))
        if self._planner is None or decision is None:
            return WaitedLoad(load, None)
        if self.overlap:
            return OverlappedLoad(load, decision, self._planner, block_size=self._block_size)
        return WaitedLoad(load, self._planner.watch(decision, load, self._timeout_s))
