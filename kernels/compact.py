"""In-place defragmentation: the last used blocks of a pool fill the holes before them.

Bytes moved: each moved block is read once and written once; blocks already in place are not touched. Sources lie behind
all destinations, so the moves of one plan do not depend on each other and go out as one copy.
"""

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.checks import KernelArgumentError, check_distinct, check_ids, describe
from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.view import View

__all__ = ["Moves", "compact", "plan_compaction"]

Moves = npt.NDArray[np.int64]
"""int64 [num_moves, 2]: block to move, and the free block that it moves to."""


def plan_compaction(used_mask: npt.NDArray[np.bool_]) -> Moves:
    """The fewest moves after which the used blocks are the first blocks of the pool. Both columns ascend.

    Args:
        used_mask: bool [num_blocks], true for blocks in use.

    Returns:
        Moves from the tail into the holes; apply them with `compact` and rename the blocks accordingly.

    Raises:
        KernelArgumentError: not a 1-D array of bool.

    >>> import numpy as np
    >>> plan_compaction(np.array([True, False, True, False, False, True, True])).tolist()
    [[5, 1], [6, 3]]
    """
    if not isinstance(used_mask, np.ndarray) or used_mask.dtype != np.bool_ or used_mask.ndim != 1:
        raise KernelArgumentError(f"used_mask must be bool [num_blocks], got {describe(used_mask)}")
    num_used = int(np.count_nonzero(used_mask))
    moved = np.flatnonzero(used_mask[num_used:]) + num_used
    holes = np.flatnonzero(~used_mask[:num_used])
    return np.stack((moved, holes), axis=1).astype(np.int64, copy=False)


def compact(pool: View, moves: Moves, *, sm_budget: int | None = None, stream: torch.cuda.Stream | None = None) -> None:
    """Moves blocks within a pool. Sources keep their bytes until they are written over; destinations must be free.

    Moves may not build on each other: a block that is both moved and moved to is refused, whatever the order.

    Args:
        pool: the pool.
        moves: int64 [num_moves, 2], see `Moves`; may be empty.
        sm_budget: as of `copy_blocks`.
        stream: as of `copy_blocks`.

    Raises:
        KernelArgumentError: a number is out of range, a block is moved twice or moved to twice, or moves form a chain.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> keys = torch.arange(7).view(7, 1, 1, 1)
    >>> used = np.array([True, False, True, False, False, True, True])
    >>> compact(from_paged(keys, "BTHD"), plan_compaction(used))
    >>> keys.flatten()[: used.sum()].tolist()
    [0, 5, 2, 6]
    """
    if not isinstance(moves, np.ndarray) or moves.dtype != np.int64 or moves.ndim != 2 or moves.shape[1] != 2:
        raise KernelArgumentError(f"moves must be int64 [num_moves, 2], got {describe(moves)}")
    sources, destinations = moves[:, 0], moves[:, 1]
    for ids, name in ((sources, "sources of moves"), (destinations, "destinations of moves")):
        check_ids(ids, name, pool.num_blocks)
        check_distinct(ids, name, pool.num_blocks)
    chained = np.intersect1d(sources, destinations, assume_unique=True)
    if chained.size:
        raise KernelArgumentError(f"block {chained[0]} is moved and moved to; split the chain into calls or shorten it")
    copy_blocks(pool, sources, pool, destinations, sm_budget=sm_budget, stream=stream)
