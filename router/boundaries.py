"""Where along a sequence holders drop out, found by bisection."""

from bisect import bisect_left
from collections.abc import Callable

from dynamo.router.chain import PrefixChain

__all__ = ["FIRST_BLOCKS", "STEP_BLOCKS", "boundaries"]

FIRST_BLOCKS = 64
"""What is hashed at least: little enough for a prompt that nobody knows."""

STEP_BLOCKS = 256
"""At most this much is hashed beyond the deepest holder."""


def boundaries(chain: PrefixChain, mask_of: Callable[[int], int]) -> list[tuple[int, int]]:
    """(depth, holders that have the blocks before `depth` and not the one there), depth ascending, 1 or more.

    Only a few blocks are looked at: one in every stretch of 256, and some eight for each boundary. Hashes no further than
    one stretch beyond the deepest holder. Every holder must have a prefix of the sequence: then masks only lose bits along
    it, so that they descend as numbers too, and the standard library's bisection does.

    Args:
        mask_of: holders of a key, a bit each, 0 for none.
    """
    end = chain.num_blocks
    keys = chain.hashed(FIRST_BLOCKS)
    if not end:
        return []
    found: list[tuple[int, int]] = []
    mask = mask_of(keys[0])
    at, last = 0, min(FIRST_BLOCKS, end) - 1
    while mask:
        last_mask = mask_of(keys[last])
        if last_mask != mask:
            ascending = keys[at : last + 1]
            ascending.reverse()
            below = len(ascending)
            while mask != last_mask:
                below = bisect_left(ascending, mask, 0, below, key=mask_of)  # so many blocks have fewer holders
                next_mask = mask_of(ascending[below - 1]) if below else 0
                found.append((last + 1 - below, mask & ~next_mask))
                mask = next_mask
        if last == end - 1:
            break
        at, last = last, min(last + STEP_BLOCKS, end - 1)
        if mask:
            keys = chain.hashed(last + 1)
    if mask:
        found.append((end, mask))
    return found
