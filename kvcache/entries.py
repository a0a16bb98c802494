"""The idle slots of a pool, by the use that left them behind: what a policy of eviction ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.eviction import EvictionOrder, Use
from dynamo.tiers.tier import SlotIds

__all__ = ["Entries"]


@dataclass(slots=True)
class _Entry:
    """`slots`, last block of the chain first, may hold stale places; `num_live` of them are the entry's."""

    use: Use
    slots: SlotIds
    num_live: int


class Entries:
    """Which idle slot lies in which entry, and in what order entries give up blocks. Not thread-safe: belongs to a pool.

    Attributes:
        num_slots: slots in entries.
        barred: entries that were found to have nothing to give up now: all their blocks have descendants elsewhere.

    Filing n slots is a few array operations, whatever n is. A slot that leaves, for it is used or filed anew, leaves its
    place in the old entry stale: stale places are recognised by the slot's stamp, which names the only entry in which the
    slot counts. An entry without live places is gone.
    """

    def __init__(self, num_slots: int, order: EvictionOrder) -> None:
        self._order = order
        # Number of the entry an idle slot is in; 0: not idle.
        self._stamp: npt.NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)
        self._entries: dict[int, _Entry] = {}
        self._last_number = 0
        self._num_places = 0
        self.num_slots = 0
        self.barred: set[int] = set()

    @property
    def num_places(self) -> int:
        """Places in all entries, stale ones included: what the order costs in memory. `num_slots` counts the others."""
        return self._num_places

    def idle(self, slots: SlotIds) -> SlotIds:
        """Those of `slots` that lie in entries."""
        idle: SlotIds = slots[self._stamp[slots] != 0]
        return idle

    def all_idle(self) -> SlotIds:
        """All slots that lie in entries, ascending."""
        return np.flatnonzero(self._stamp)

    def entry_of(self, slot: int) -> int:
        """Number of the entry that an idle slot is in; 0: the slot is not idle."""
        return int(self._stamp[slot])

    def use(self, number: int) -> Use:
        """Who filed the entry."""
        return self._entries[number].use

    def slots(self, number: int) -> SlotIds:
        """Live slots of an entry, last block of the chain first; not to be written to."""
        entry = self._entries[number]
        if entry.num_live < len(entry.slots):
            self._num_places -= len(entry.slots) - entry.num_live
            entry.slots = entry.slots[self._stamp[entry.slots] == number]
        return entry.slots

    def file(self, slots: SlotIds, use: Use) -> None:
        """Makes an entry of slots that are in none, given in chain order; at least one."""
        self._last_number += 1
        self._stamp[slots] = self._last_number
        self._entries[self._last_number] = _Entry(use, slots[::-1], len(slots))
        self._order.add(self._last_number, use, len(slots))
        self.num_slots += len(slots)
        self._num_places += len(slots)
        if self._num_places > 4 * len(self._stamp) + 1024:
            for number in self._entries:
                self.slots(number)

    def file_again(self, slots: SlotIds, use: Use) -> None:
        """Moves idle slots, given in chain order, to a new entry, but for those that a later use has filed."""
        pieces = self._pieces(slots)
        if use.number:
            known = (use.number, use.num_output_tokens)
            later = [
                (start, end)
                for number, start, end in pieces
                if ((filed := self._entries[number].use).number, filed.num_output_tokens) > known
            ]
            if later:
                keep = np.ones(len(slots), dtype=np.bool_)
                for start, end in later:
                    keep[start:end] = False
                slots = slots[keep]
        self.leave(slots)
        if len(slots):
            self.file(slots, use)

    def leave(self, slots: SlotIds) -> None:
        """Takes those of `slots` that lie in entries out of them."""
        pieces = self._pieces(slots)
        if pieces:
            self._stamp[slots] = 0
        for number, start, end in pieces:
            entry = self._entries[number]
            entry.num_live -= end - start
            self.num_slots -= end - start
            if not entry.num_live:
                self.remove_empty(number)

    def give_up(self, number: int, start: int, end: int) -> bool:
        """Takes `slots(number)[start:end]` out of the entry; returns whether it is empty, for `remove_empty` to remove it.

        That is left to the caller, who is iterating over `candidates`.
        """
        entry, count = self._entries[number], end - start
        self._stamp[entry.slots[start:end]] = 0
        entry.slots = entry.slots[end:] if start == 0 else np.delete(entry.slots, slice(start, end))
        entry.num_live -= count
        self.num_slots -= count
        self._num_places -= count
        return not entry.num_live

    def unbar(self, slot: int) -> int:
        """Takes note that an idle slot's entry has something to give up again; returns the entry's number."""
        number = self.entry_of(slot)
        self.barred.discard(number)
        return number

    def remove_empty(self, number: int) -> None:
        """Removes an entry of which all places are stale."""
        self._num_places -= len(self._entries.pop(number).slots)
        self._order.remove(number)
        self.barred.discard(number)

    def candidates(self, now_s: float) -> Iterator[int]:
        """Numbers of all entries, that which is to give up blocks first at the front."""
        return self._order.candidates(now_s)

    def numbers(self) -> Iterator[int]:
        """Numbers of all entries, in the order in which they were filed."""
        return iter(self._entries)

    def clear(self) -> None:
        """Takes all slots out of their entries."""
        for number in self._entries:
            self._order.remove(number)
        self._entries.clear()
        self.barred.clear()
        self._stamp[:] = 0
        self.num_slots = self._num_places = 0

    def grow(self, num_slots: int) -> None:
        """Has room for slots up to `num_slots`."""
        stamp = np.zeros(num_slots, dtype=np.int64)
        stamp[: len(self._stamp)] = self._stamp
        self._stamp = stamp

    def check_invariants(self) -> None:
        """Raises AssertionError if stamps and counts disagree."""
        idle = self.all_idle()
        live = {number: entry.slots[self._stamp[entry.slots] == number] for number, entry in self._entries.items()}
        for number, entry in self._entries.items():
            assert len(live[number]) == entry.num_live > 0, f"entry {number} counts {entry.num_live} live slots wrongly"
        filed = np.concatenate(list(live.values())) if live else idle[:0]
        assert sorted(filed.tolist()) == idle.tolist(), "idle slots and filed slots differ"
        assert len(idle) == self.num_slots, f"{len(idle)} idle slots, {self.num_slots} counted"
        assert sum(len(entry.slots) for entry in self._entries.values()) == self._num_places, "places are miscounted"

    def _pieces(self, slots: SlotIds) -> list[tuple[int, int, int]]:
        """Stretches of `slots` that are in one entry, as (number, start, end); slots of a chain make few of them."""
        numbers: npt.NDArray[np.int64] = self._stamp[slots]
        (cuts,) = (numbers[1:] != numbers[:-1]).nonzero()
        if not len(cuts):
            return [(int(numbers[0]), 0, len(slots))] if len(slots) and numbers[0] else []
        starts = [0, *(cuts + 1).tolist()]
        ends = [*starts[1:], len(slots)]
        return [piece for piece in zip(numbers[starts].tolist(), starts, ends, strict=True) if piece[0]]
