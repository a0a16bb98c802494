"""Least hit density: what promises the fewest hits for each second it stays goes first."""

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.eviction import Use
from dynamo.kvcache.hazards import ReuseTables, group_of
from dynamo.kvcache.reuse import ReuseTracker

__all__ = ["HitDensity"]

_PRICE_EVICTIONS = 4
_FRONT = 256  # entries; the evictions between two sorts seldom reach further
_LAST_ENTRY = 1 << 62
_RESORT_S = 2.0  # ranks change with age, whose bins are not narrower than this

_Place = tuple[bool, int, float, int]
"""What the order goes by: not expired, priority, index, entry. Entries grow with time, so that of equals the oldest goes."""


class HitDensity:
    """Orders entries by the Gittins index of keeping them, least first; of equals, the one filed first.

    Implements EvictionOrder for one pool; several pools share a tracker. Expired entries go before all others, and those of
    a lower priority before those of a higher one. The order is sorted anew every two seconds, if it is asked for, and whenever
    the tracker has learned, as far as it is looked at: the front, and all of it where that is used up. In between, new
    entries are inserted, and `candidates` costs what is taken from it.
    """

    def __init__(self, tracker: ReuseTracker) -> None:
        self._price = 0.0
        self._evicted_s = float("-inf")
        self._reached = 0.0  # by the last eviction
        self._tracker = tracker
        self._tables: ReuseTables | None = None  # those that `_sorted` was ranked with
        self._sorted_s = float("-inf")
        self._sorted: list[_Place] = []  # removed entries are skipped
        self._first = 0  # places before this one are of removed entries
        self._front = _FRONT
        self._limit: _Place | None = None  # entries from here on are not among the sorted ones; None: all are
        self._rows: dict[int, int] = {}  # entry -> row of the arrays
        self._free: list[int] = []
        self._entry = np.empty(0, dtype=np.int64)  # -1: free row
        self._used_s = np.empty(0)
        self._group = np.empty(0, dtype=np.int64)
        self._priority = np.empty(0, dtype=np.int64)
        self._expires_s = np.empty(0)

    def __len__(self) -> int:
        """Entries known."""
        return len(self._rows)

    def add(self, entry: int, use: Use, num_blocks: int) -> None:
        """Files an entry."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        group = group_of(use)
        self._rows[entry] = row
        self._entry[row] = entry
        self._used_s[row] = use.time_s
        self._group[row] = group
        self._priority[row] = use.priority
        self._expires_s[row] = np.inf if use.expires_s is None else use.expires_s
        if self._tables is not None:
            place = (True, use.priority, float(self._tables.index[group, 0]), entry)
            if self._limit is None or place < self._limit:
                insort(self._sorted, place, lo=self._first)

    def remove(self, entry: int) -> None:
        """Forgets an entry."""
        row = self._rows.pop(entry, None)
        if row is not None:
            self._entry[row] = -1
            self._free.append(row)

    def price(self, now_s: float) -> float:
        """Index up to which entries had to go, mean of late: the hits per second for which a block stays. 0: there is room.

        Where a price keeps new blocks out, nothing is evicted, and what lies there is worth less and less. So every two seconds
        without an eviction the price falls towards what the first entry to go is worth now: it would keep them out for ever.
        """
        if self._price > 0 and now_s - self._evicted_s >= _RESORT_S and self._sort_if_stale(now_s):
            is_worth_something = bool(self._sorted) and self._sorted[0][0]  # not where there is none, or it has expired
            lowest = self._sorted[0][2] if is_worth_something else 0.0
            self._price += min(0.0, lowest - self._price) / _PRICE_EVICTIONS
            self._reached = min(self._reached, self._price)  # what was evicted long ago says nothing any more
        return self._price

    def candidates(self, now_s: float) -> Iterator[int]:
        """Least hit density first."""
        self._price += (self._reached - self._price) / _PRICE_EVICTIONS
        self._evicted_s = now_s
        self._sort_if_stale(now_s)
        assert self._tables is not None
        yield from self._known_from(self._first)
        if self._limit is not None:
            limit, self._front = self._limit, 2 * self._front
            self._sort(self._tables, None)
            yield from self._known_from(bisect_left(self._sorted, limit))

    def _sort_if_stale(self, now_s: float) -> bool:
        """Sorts anew if the ranks are two seconds old, or those of older tables; returns whether it did."""
        if now_s - self._sorted_s < _RESORT_S and self._tables is self._tracker.tables:
            return False
        self._tables, self._sorted_s = self._tracker.tables, max(now_s, self._sorted_s)  # offers may come late
        self._sort(self._tables, self._front)
        return True

    def _known_from(self, first: int) -> Iterator[int]:
        known = self._rows
        if first == self._first:
            while first < len(self._sorted) and self._sorted[first][3] not in known:
                first += 1
            self._first = first
        for i in range(first, len(self._sorted)):
            _, _, index, entry = self._sorted[i]
            if entry in known:
                self._reached = index
                yield entry

    def _sort(self, tables: ReuseTables, count: int | None) -> None:
        """Sorts all entries by their ranks at `_sorted_s`, or at least the first `count`."""
        rows: npt.NDArray[np.int64] = np.flatnonzero(self._entry >= 0)
        index = tables.ranks(self._group[rows], self._sorted_s - self._used_s[rows])
        lives = self._expires_s[rows] > self._sorted_s
        priorities = self._priority[rows]
        self._limit, self._first = None, 0
        if count is not None and len(rows) > 2 * count:
            lowest = lives == lives.min()
            lowest &= priorities == priorities[lowest].min()
            if np.count_nonzero(lowest) > count:
                last = np.partition(index[lowest], count)[count]
                at = int(lowest.argmax())
                self._limit = (bool(lives[at]), int(priorities[at]), float(last), _LAST_ENTRY)
                lowest &= index <= last
                rows, index, lives, priorities = rows[lowest], index[lowest], lives[lowest], priorities[lowest]
        entries = self._entry[rows]
        order = np.lexsort((entries, index, priorities, lives))
        columns = (lives[order].tolist(), priorities[order].tolist(), index[order].tolist(), entries[order].tolist())
        self._sorted = list(zip(*columns, strict=True))

    def _grow(self) -> None:
        size = len(self._entry)
        more = max(1024, size)
        self._entry = np.concatenate((self._entry, np.full(more, -1, dtype=np.int64)))
        self._used_s = np.concatenate((self._used_s, np.zeros(more)))
        self._group = np.concatenate((self._group, np.zeros(more, dtype=np.int64)))
        self._priority = np.concatenate((self._priority, np.zeros(more, dtype=np.int64)))
        self._expires_s = np.concatenate((self._expires_s, np.zeros(more)))
        self._free.extend(range(size + more - 1, size - 1, -1))
