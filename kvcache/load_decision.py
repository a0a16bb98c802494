"""What is decided about a prefix that lies in lower tiers: the question, and the answer."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["LoadDecision", "LoadKind", "LoadQuestion", "TierRun"]

LoadKind = Literal["loaded", "split", "computed", "gave_up"]


@dataclass(frozen=True, slots=True)
class TierRun:
    """`num_blocks` blocks that follow one another in a chain and lie in `tier`."""

    tier: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class LoadQuestion:
    """What a decision is about.

    Attributes:
        runs: where the loadable blocks lie, in chain order.
        first: position in the chain of the first of them; what precedes it is in device memory.
        num_tokens: of the whole prompt.
    """

    runs: tuple[TierRun, ...]
    first: int
    num_tokens: int

    @property
    def num_blocks(self) -> int:
        """Loadable blocks."""
        return sum(run.num_blocks for run in self.runs)

    def tiers(self, num_blocks: int) -> set[str]:
        """Where the first `num_blocks` loadable blocks lie."""
        starts = accumulate((run.num_blocks for run in self.runs), initial=0)
        return {run.tier for start, run in zip(starts, self.runs, strict=False) if start < num_blocks}

    @property
    def tier_of_each(self) -> npt.NDArray[np.str_]:
        """str [num_blocks]: where each loadable block lies."""
        return np.repeat([run.tier for run in self.runs], [run.num_blocks for run in self.runs])

    def tier_at(self, position: int) -> str:
        """Tier of the loadable block at `position`, or of the last one."""
        for run in self.runs:
            if position < run.num_blocks:
                return run.tier
            position -= run.num_blocks
        return self.runs[-1].tier


@dataclass(frozen=True, slots=True)
class LoadDecision:
    """What is loaded of a prefix.

    Attributes:
        question: what it is about.
        decided_s: when it was made.
        num_blocks_to_load: leading ones.
        expected_load_s: until they have all come; None where a tier's speed is not known.
        expected_compute_s: computing the same blocks instead; None where that is not known.
        patience_s: what the load may cost beyond the computing that it saves; None for as long as it takes, 0 where nobody
            waits for it.
        reason: for the log.
    """

    question: LoadQuestion
    decided_s: float
    num_blocks_to_load: int
    expected_load_s: float | None
    expected_compute_s: float | None
    patience_s: float | None
    reason: str
