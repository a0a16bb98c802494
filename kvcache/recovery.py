"""Finds the books of a disk tier again after a restart: a million blocks in well under a second.

The index tells blocks in the order in which they were recorded. Mostly a block was recorded right after its parent, so that
chains fall into few *runs* of neighbours. All that has to follow chains works on runs, by pointer jumping
(https://en.wikipedia.org/wiki/Pointer_jumping): as many rounds as the logarithm of the number of runs.
"""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.lineage import NO_PARENT
from dynamo.kvcache.pool import BlockPool
from dynamo.tiers.records import NAME_BYTES
from dynamo.tiers.recovered import RecoveredBlocks

__all__ = ["RecoveredOrder", "order_recovered", "recover"]

logger = logging.getLogger(__name__)

Positions = npt.NDArray[np.int64]

_MAX_LAG = 4096  # so many sequences may have grown at a time
_ENTRY_BLOCKS = 1024  # blocks of several chains are filed together up to about so many: entries cost more than blocks


def recover(pool: BlockPool, recovered: RecoveredBlocks) -> None:
    """Fills an unused disk pool with what an index told."""
    names, parent_names, parent = _as_items(recovered.names), _as_items(recovered.parents), recovered.parent_index
    found = order_recovered(parent)
    order = found.order
    if len(order) < len(names):
        logger.warning("%d blocks on disk are their own ancestors; they are forgotten", len(names) - len(order))
    slots, above = recovered.slots[order], parent[order]
    (lost,) = np.nonzero((above == NO_PARENT) & recovered.parents[order].any(axis=1))  # the root's name is all zeros
    pool.restore(
        names[order],
        slots,
        np.where(above == NO_PARENT, NO_PARENT, recovered.slots[above]),
        found.ends,
        dict(zip(slots[lost].tolist(), parent_names[order[lost]].tolist(), strict=True)),
    )


@dataclass(frozen=True, slots=True)
class RecoveredOrder:
    """Positions of recovered blocks.

    Attributes:
        order: blocks in the order in which they are to be evicted: least recently used chains first, leaves before their
            parents. A block counts as used when the last of its descendants was recorded. Blocks of which the ancestors
            make a ring, as damaged records can, are left out.
        ends: positions in `order` up to which blocks make up one entry each.
    """

    order: Positions
    ends: list[int]


@dataclass(frozen=True, slots=True)
class _Runs:
    """Blocks that stand right after their parents: run k is at places [starts[k], starts[k] + lengths[k]).

    Attributes:
        of: the run at each place, [n].
        above: the place of the block before the first of each run, NO_PARENT for none.
    """

    starts: Positions
    lengths: Positions
    of: Positions
    above: Positions


def order_recovered(parent: Positions) -> RecoveredOrder:
    """Puts blocks in order, given each one's parent's position, in the order in which they were recorded.

    Args:
        parent: int64 [n]; NO_PARENT for none.
    """
    if not len(parent):
        return RecoveredOrder(parent, [])
    depth, last_use, is_ringed = _follow_chains(parent)
    kept = np.flatnonzero(~is_ringed)
    if not len(kept):
        return RecoveredOrder(kept, [])
    # Blocks of equal last use make up a path, which leads up from the block that was recorded then.
    use = last_use[kept]
    counts = np.bincount(use, minlength=len(parent))
    begins = np.cumsum(counts) - counts
    order = np.empty(len(kept), dtype=np.int64)
    order[begins[use] + depth[use] - depth[kept]] = kept
    ends = np.cumsum(counts)[counts > 0]
    last_in_window = np.append(np.diff(ends // _ENTRY_BLOCKS) > 0, True)
    return RecoveredOrder(order, ends[last_in_window].tolist())


def _as_items(names: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """Names, uint8 [n, 16], as void16 [n]."""
    return np.ascontiguousarray(names).view(f"V{NAME_BYTES}").reshape(-1)


def _find_runs(parent: Positions) -> _Runs:
    is_start = parent != np.arange(-1, len(parent) - 1)
    is_start[0] = True
    starts = np.flatnonzero(is_start)
    return _Runs(starts, np.diff(np.append(starts, len(parent))), np.cumsum(is_start) - 1, parent[starts])


def _follow_chains(parent: Positions) -> tuple[Positions, Positions, npt.NDArray[np.bool_]]:
    """Depth and last use of each block, and which ones lie below a ring: their values mean nothing."""
    lag = _usual_lag(parent)
    if lag == 1:
        recorded = np.arange(len(parent))
        runs = _find_runs(parent)
    else:  # every lag-th block first, then those after them, and so on: then most stand right after their parents
        recorded = np.concatenate([np.arange(first, len(parent), lag) for first in range(lag)])
        place = np.empty_like(recorded)
        place[recorded] = np.arange(len(parent))
        above = parent[recorded]
        runs = _find_runs(np.where(above == NO_PARENT, NO_PARENT, place[above]))
    depth, last_use, is_ringed = _follow_runs(runs, recorded)
    if lag == 1:
        return depth, last_use, is_ringed[runs.of]
    return depth[place], last_use[place], is_ringed[runs.of][place]


def _usual_lag(parent: Positions) -> int:
    """How many blocks after their parents most blocks were recorded."""
    lags = np.arange(len(parent)) - parent
    lags = lags[(parent != NO_PARENT) & (lags > 0) & (lags <= _MAX_LAG)]
    return int(np.bincount(lags).argmax()) if len(lags) else 1


def _follow_runs(runs: _Runs, recorded: Positions) -> tuple[Positions, Positions, npt.NDArray[np.bool_]]:
    """Depth and last use of the blocks at each place, and which runs lead up to a ring.

    Args:
        recorded: when the block at each place was.
    """
    starts, above = runs.starts, runs.above
    num_runs = len(starts)
    jump = np.where(above == NO_PARENT, NO_PARENT, runs.of[above])  # the ancestor 2**round runs above
    start_depth = np.where(above == NO_PARENT, 0, above - starts[jump] + 1)
    latest = np.maximum.reduceat(recorded, starts)  # of all that descends from a run, up to 2**round runs below it
    for _ in range(num_runs.bit_length() + 1):
        (active,) = np.nonzero(jump != NO_PARENT)
        if not len(active):
            break
        targets = jump[active]
        np.maximum.at(latest, targets, latest[active])
        start_depth[active] += start_depth[targets]
        jump[active] = jump[targets]
    is_ringed = jump != NO_PARENT
    depth = np.arange(len(runs.of)) + np.repeat(start_depth - starts, runs.lengths)
    # From a run's end up: the last use of all that branches off there or below.
    last_use = recorded.copy()
    branches = np.flatnonzero((above != NO_PARENT) & ~is_ringed)
    np.maximum.at(last_use, above[branches], latest[branches])
    floor = np.repeat(
        np.arange(num_runs)[::-1] * len(runs.of), runs.lengths
    )  # keeps a run's values out of the next one's
    last_use += floor
    last_use = np.maximum.accumulate(last_use[::-1])[::-1] - floor
    return depth, last_use, is_ringed
