"""Where along a sequence holders drop out, found by bisection."""

from collections.abc import Callable

from dynamo.router.chain import PrefixChain

__all__ = ["boundaries"]

_FIRST_BLOCKS = 64
_STEP_BLOCKS = 256  # at most this much is hashed beyond the deepest holder


def boundaries(chain: PrefixChain, get: Callable[[int, int], int], within: int) -> list[tuple[int, int]]:
    """(depth, holders that have the blocks before `depth` and not the one there), depth ascending, 1 or more.

    Every holder must have a prefix of the sequence; then only a few blocks need be looked at: one in every stretch of 256,
    and some ten for each boundary. Hashes no further than one stretch beyond the deepest holder.

    Args:
        get: holders' mask of a key; its second argument is what to give for an unknown one.
        within: holders to look at.
    """
    end = chain.num_blocks
    if not end:
        return []
    found: list[tuple[int, int]] = []
    keys = chain.hashed(_FIRST_BLOCKS)
    raw = get(keys[0], 0)
    mask = raw & within
    at, last = 0, min(_FIRST_BLOCKS, end) - 1
    while mask:
        next_raw = get(keys[last], 0)
        if next_raw is not raw:  # equal masks are one object as a rule
            next_mask = next_raw & within
            if next_mask != mask:
                _bisect(keys, get, within, (at, mask), (last, next_mask), found)
            raw, mask = next_raw, next_mask
        if last == end - 1:
            break
        at, last = last, min(last + _STEP_BLOCKS, end - 1)
        if mask:
            keys = chain.hashed(last + 1)
    if mask:
        found.append((end, mask))
    return found


def _bisect(
    keys: list[int],
    get: Callable[[int, int], int],
    within: int,
    low: tuple[int, int],
    high: tuple[int, int],
    found: list[tuple[int, int]],
) -> None:
    """Appends the boundaries above `low` up to `high`, two (position, mask) with different masks."""
    at, mask = low
    ahead = [high]  # known masks above `at`, nearest last
    while ahead:
        top, top_mask = ahead[-1]
        if top_mask == mask:
            at = top
            ahead.pop()
        elif top - at == 1:
            found.append((top, mask & ~top_mask))
            at, mask = top, top_mask
            ahead.pop()
        else:
            middle = (at + top) >> 1
            middle_mask = get(keys[middle], 0) & within
            if middle_mask == mask:
                at = middle
            elif middle_mask == top_mask:
                ahead[-1] = (middle, top_mask)
            else:
                ahead.append((middle, middle_mask))
