"""Which idle blocks of a pool make way: leaves first, from the entries that the order of eviction puts first."""

import heapq
from collections.abc import Iterable

from dynamo.kvcache.entries import Entries
from dynamo.kvcache.lineage import NO_PARENT, Lineage
from dynamo.tiers.tier import SlotIds

__all__ = ["choose_victims"]


def choose_victims(
    entries: Entries, lineage: Lineage, count: int, candidates: Iterable[int]
) -> tuple[list[SlotIds], list[int]]:
    """Takes up to `count` blocks out of entries and lineage, leaves first.

    Always the first leaf of the first entry that has one, and what it alone continues; so when the last descendant of
    an entry passed over is gone, it is that entry's turn again.

    Args:
        candidates: numbers of entries, in the order in which they are to give up blocks.

    Returns:
        The slots, and the entries passed over that still have blocks.
    """
    chosen: list[SlotIds] = []
    emptied: list[int] = []
    passed: dict[int, int] = {}  # rank by entry
    for rank, candidate in enumerate(candidates):
        if candidate in entries.barred:
            passed[candidate] = rank
            continue
        turns = [(rank, candidate)]
        while turns and count:
            rank, number = turns[0]
            slots = entries.slots(number)
            start = lineage.first_leaf(slots)
            if start is None:
                entries.barred.add(number)
                passed[number] = rank
                heapq.heappop(turns)
                continue
            num_cut, opened = lineage.cut(slots[start : start + count])
            chosen.append(slots[start : start + num_cut])
            count -= num_cut
            if entries.give_up(number, start, start + num_cut):
                emptied.append(number)
                heapq.heappop(turns)
            if opened != NO_PARENT and (above := entries.unbar(opened)) in passed:
                heapq.heappush(turns, (passed.pop(above), above))
        if not count:
            break
    for number in emptied:
        entries.remove_empty(number)
    return chosen, list(passed)
