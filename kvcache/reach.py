"""Which blocks may go into a tier without leaving a gap before them: nobody finds a block whose prefix is missing."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.pool import BlockPool

__all__ = ["reachable"]


def reachable(pool: BlockPool, keys: Sequence[BlockKey], parents: Sequence[BlockKey | None]) -> npt.NDArray[np.bool_]:
    """Which blocks have their parent in the pool, or would, were all such blocks put there in this order.

    Works on runs in which each block's parent is the block before it, so its cost hardly depends on their length. The
    caller holds the lock of the pool.

    Args:
        keys: distinct keys, parents before their children.
        parents: of each key; None for the first block of a sequence.

    Returns:
        bool [n].
    """
    is_reachable = np.zeros(len(keys), dtype=np.bool_)
    if not keys:
        return is_reachable
    is_present = pool.locate(keys) >= 0
    heads, position_of = [0], {}
    if list(parents[1:]) != list(keys[:-1]):
        heads += [i for i in range(1, len(keys)) if parents[i] != keys[i - 1]]
        position_of = {key: i for i, key in enumerate(keys)}
    for head, end in pairwise([*heads, len(keys)]):
        parent = parents[head]
        first = head
        if parent is not None and parent not in pool and not is_reachable[position_of.get(parent, head)]:
            present = np.flatnonzero(is_present[head:end])
            first = head + int(present[0]) + 1 if len(present) else end
        is_reachable[first:end] = True
    return is_reachable
