"""Loads a prefix from its end while the caller computes it from its start, until the two meet.

A block that was loaded is good whoever computes what precedes it, and blocks at the end of a prompt cost most to compute. So
a caller who computes in pieces asks, before each, which tokens are next: those that have come are passed over, and those that
it is given will not be written by the load any more. A slow load then costs nothing but the computing that it spares, a
block that fails is computed alone, and nobody has to know beforehand how slow the tier is.

    asked ── waiting, while the load is much faster than computing ──► computing and loading ──► met, or nothing left to load

At first the caller does wait, since a fast tier has brought everything before one piece is computed, and the device may have
others to compute for: as long as what has arrived grows several times as fast as computing would make it grow, and a little
patience more. Time waited <= patience + a quarter of the time saved; for short prompts, and while nothing is measured yet, the
patience is some milliseconds and not a share of computing (`LoadPlanner.plan_overlapped`).

From both ends at once is Cake's idea (https://arxiv.org/abs/2410.03065).
"""

import time
from collections.abc import Callable

import numpy as np

from dynamo.kvcache.load_decision import LoadDecision
from dynamo.kvcache.planner import FAST_SHARE, LoadPlanner
from dynamo.tiers.tier import Outcomes
from dynamo.tiers.transfer import Transfer

__all__ = ["OverlappedLoad"]

_STEP_TOKENS = 64  # fewer that have come are computed again: passing over them costs a step of its own


class OverlappedLoad:
    """One load, and how far the caller's computing has got. Used by the sequence's thread; owns the load until `finish`.

    Positions are those of the load's blocks: 0 is the first that could be loaded.
    """

    def __init__(
        self,
        load: Transfer,
        decision: LoadDecision,
        planner: LoadPlanner,
        *,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listens to `load`, which has just begun to bring the blocks of `decision`, the last first."""
        self._load = load
        self._decision = decision
        self._planner = planner
        self._clock = clock
        self._least_run = max(1, _STEP_TOKENS // block_size)
        self._used: Outcomes = np.zeros(load.num_blocks, dtype=np.bool_)
        self._waited_s: float | None = None
        self._is_finished = False
        self._ready_s = self._ended_s = np.inf
        if decision.patience_s is not None:
            self._savings_s = planner.block_savings(decision.question)
            self._ready_s = decision.decided_s + decision.patience_s
            if decision.patience_s:  # else there is nothing to wait for
                load.on_progress(self._wait_longer)
        load.when_ended(self._note_end)

    @property
    def is_ready(self) -> bool:
        """Whether computing should begin: nothing more comes, or what comes is not worth waiting for."""
        return self._waited_s is not None or self._load.is_due or self._clock() >= self._ready_s

    @property
    def patience_left_s(self) -> float:
        """Seconds after which computing should begin, unless more blocks arrive or the load ends before."""
        return 0.0 if self.is_ready else max(0.0, min(self._ready_s - self._clock(), self._load.remaining_s))

    @property
    def used(self) -> Outcomes:
        """bool [num_blocks]: blocks that `pass_over` has passed over."""
        return self._used

    @property
    def num_late(self) -> int:
        """Blocks that the load's time limit kept from coming."""
        return int(np.count_nonzero(~self._load.arrived)) if self._load.is_expired else 0

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until `is_ready`, and for `timeout_s` at most. The load goes on."""
        latest = np.inf if timeout_s is None else self._clock() + timeout_s
        while not self.is_ready:  # more than once round when blocks have arrived meanwhile
            remaining_s = min(self.patience_left_s, latest - self._clock())
            if remaining_s <= 0:
                return
            self._load.wait_ended(remaining_s)

    def when_ended(self, callback: Callable[[], None]) -> None:
        """See `Transfer.when_ended`."""
        self._load.when_ended(callback)

    def pass_over(self, position: int) -> int:
        """How many blocks from `position` on need not be computed, since they have come. They count as used."""
        self._end_waiting()
        here = self._load.arrived[position:]
        count = len(here) if here.all() else int(np.argmin(here))
        self._used[position : position + count] = True
        return count

    def claim(self, position: int, stop: int) -> int:
        """Makes the blocks from `position` to `stop` the caller's, or fewer where later ones have come.

        Returns:
            The first block that is not the caller's: it and those after it may still be loaded. `position` itself where
            that one has come since `pass_over`.
        """
        self._end_waiting()
        met = _first_run(self._load.arrived[position:], self._least_run)
        if met is not None:
            stop = min(stop, position + met)
        self._load.raise_floor(stop)
        if stop >= self._load.num_blocks:
            self.finish()
        return stop

    def finish(self) -> None:
        """Ends the load, of which nothing is written any more, and books what it was good for. Idempotent."""
        if self._is_finished:
            return
        self._is_finished = True
        self._load.cancel()
        if self._waited_s is not None:  # else nobody began to compute: no decision was carried out
            self._planner.settle_overlapped(self._decision, self._waited_s, self._used)

    def _wait_longer(self) -> None:
        """Called when blocks have arrived, on the thread that brought them."""
        decision = self._decision
        saved_s = float(self._savings_s[self._load.arrived].sum())
        self._ready_s = decision.decided_s + (decision.patience_s or 0.0) + FAST_SHARE * saved_s

    def _note_end(self) -> None:
        self._ended_s = self._clock()

    def _end_waiting(self) -> None:
        if self._waited_s is not None:
            return
        now_s = self._clock()
        self._waited_s = max(0.0, min(now_s, self._ready_s, self._ended_s) - self._decision.decided_s)
        if self._load.is_ended or now_s >= self._ready_s:
            elapsed_s = min(now_s, self._ended_s) - self._decision.decided_s
            self._planner.end_waiting(self._decision, elapsed_s, self._load.arrived, ended=self._load.is_ended)


def _first_run(arrived: Outcomes, length: int) -> int | None:
    """Where the first run of at least `length` blocks begins that have arrived."""
    counts = np.concatenate(([0], np.cumsum(arrived)))
    starts = np.flatnonzero(counts[length:] - counts[: max(0, len(counts) - length)] == length)
    return int(starts[0]) if len(starts) else None
