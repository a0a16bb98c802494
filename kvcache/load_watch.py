"""Keeps a load that somebody waits for from costing more than it saves."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.load_decision import LoadDecision
from dynamo.tiers.transfer import Transfer

__all__ = ["LoadWatch"]


class Settle(Protocol):
    """`LoadPlanner.settle`."""

    def __call__(self, decision: LoadDecision, waited_s: float, num_arrived: int, /, *, gave_up: bool) -> None: ...


class LoadWatch:
    """Keeps one load from costing more than it saves. Made by `LoadPlanner.watch`; ended by `settle`, or just forgotten."""

    def __init__(
        self,
        settle: Settle,
        decision: LoadDecision,
        transfer: Transfer,
        timeout_s: float,
        savings_s: npt.NDArray[np.float64] | None,
        clock: Callable[[], float],
    ) -> None:
        """Listens to `transfer`; `savings_s[k]` is what its first k blocks save, None for a load without patience."""
        self._settle = settle
        self._decision = decision
        self._transfer = transfer
        self._last_deadline = decision.decided_s + timeout_s
        self._savings_s = savings_s
        self._clock = clock
        self._ended_s: float | None = None
        if savings_s is not None:
            transfer.on_progress(self._extend)
        transfer.when_ended(self._note_end)

    def settle(self, num_arrived: int, *, gave_up: bool) -> None:
        """Books what became of the load: `num_arrived` leading blocks came, and the others never will.

        Args:
            gave_up: it was ended before it was complete.
        """
        ended_s = self._clock() if self._ended_s is None else self._ended_s
        self._settle(self._decision, ended_s - self._decision.decided_s, num_arrived, gave_up=gave_up)

    def _extend(self) -> None:
        decision = self._decision
        assert self._savings_s is not None, "without known savings there is no deadline to move"
        deadline = (
            decision.decided_s + (decision.patience_s or 0.0) + float(self._savings_s[self._transfer.num_leading])
        )
        self._transfer.extend(min(deadline, self._last_deadline))

    def _note_end(self) -> None:
        self._ended_s = self._clock()
