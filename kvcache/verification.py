"""Looks for blocks on disk whose bytes are no longer those that were written, while the cache goes on serving.

Blocks are read a few at a time into memory of the check's own, in the order they lie on disk, and compared with their
digests. They are not pinned for it: that would put them in front of all others in the order of eviction. A block that
looks wrong may therefore just have made way for another; only those are pinned, read again, and believed the second time.
"""

import mmap
import threading
import time
from collections.abc import Callable

import numpy as np

from dynamo.kernels.digest import digest_rows
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.shelf import Shelf, digest_seeds
from dynamo.kvcache.status import Verification
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierClosedError
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.tier import Outcomes, Rows, SlotIds

__all__ = ["DiskVerifier"]

_CLOSE_TIMEOUT_S = 30.0
_LOOKUP_BLOCKS = 4096


class DiskVerifier:
    """Checks the blocks on disk when told to, on the caller's thread; one check at a time. Thread-safe.

    Args:
        part_blocks: blocks read at a time, which bounds the memory a check takes.
    """

    def __init__(self, shelf: Shelf, disk: DiskTier, layout: BlockLayout, *, part_blocks: int) -> None:
        self._shelf = shelf
        self._disk = disk
        self._layout = layout
        self._part_blocks = part_blocks
        self._running = threading.Lock()  # held by the check that runs
        self._is_closing = False

    def run(self, timeout_s: float) -> Verification:
        """Checks what lies on disk now, for at most `timeout_s`; waits for another check to end first, within that time.

        Raises:
            TierClosedError: the cache was closed meanwhile.
        """
        started_s = time.monotonic()
        if not self._running.acquire(timeout=timeout_s):
            return _verification(len(self._shelf.disk), [], 0, started_s, is_complete=False)
        try:
            return self._run(started_s, started_s + timeout_s)
        finally:
            self._running.release()

    def close(self) -> None:
        """Ends a check that runs, and waits for it."""
        self._is_closing = True
        if self._running.acquire(timeout=_CLOSE_TIMEOUT_S):
            self._running.release()

    def _run(self, started_s: float, deadline: float) -> Verification:
        shelf = self._shelf
        with shelf.changed:
            keys = shelf.disk.keys()
        slots = self._slots_of(keys)
        order = np.argsort(slots)
        rows = np.frombuffer(mmap.mmap(-1, self._part_blocks * self._layout.slot_bytes), dtype=np.uint8)
        rows = rows.reshape(self._part_blocks, self._layout.slot_bytes)
        found: list[tuple[int, int, int]] = []
        start = 0
        while start < len(keys) and time.monotonic() < deadline:
            if self._is_closing:
                raise TierClosedError("the cache was closed while its blocks on disk were checked")
            places = order[start : start + self._part_blocks]
            start += len(places)
            found.append(self._check_part([keys[place] for place in places.tolist()], slots[places], rows))
        return _verification(len(keys), found, start, started_s, is_complete=start >= len(keys))

    def _slots_of(self, keys: list[BlockKey]) -> SlotIds:
        """Where the blocks lie; -1 for those that have gone. A few at a time, since loads wait for the shelf's lock."""
        slots = np.full(len(keys), -1, dtype=np.int64)
        for start in range(0, len(keys), _LOOKUP_BLOCKS):
            part = keys[start : start + _LOOKUP_BLOCKS]
            with self._shelf.changed:
                found = map(self._shelf.disk.find, part)
                slots[start : start + len(part)] = [-1 if slot is None else slot for slot in found]
        return slots

    def _check_part(self, keys: list[BlockKey], slots: SlotIds, rows: Rows) -> tuple[int, int, int]:
        """How many of the blocks had gone, are corrupt, and are unreadable. Forgets the latter two."""
        there, _, good = self._compare(keys, slots, rows)
        num_gone = int(np.count_nonzero(~there))
        suspects = np.flatnonzero(there & ~good)
        if not len(suspects):
            return num_gone, 0, 0
        keys, slots = [keys[place] for place in suspects.tolist()], slots[suspects]
        with self._shelf.changed:
            there = self._are_there(keys, slots)
            keys, slots = [key for key, is_there in zip(keys, there, strict=True) if is_there], slots[there]
            self._shelf.disk.acquire(slots)
        try:
            _, readable, good = self._compare(keys, slots, rows)
            if good.all() or self._shelf.notice_lost_disk() or self._is_closing:
                return num_gone, 0, 0
            bad = [key for key, is_good in zip(keys, good.tolist(), strict=True) if not is_good]
            self._shelf.forget_on_disk(bad, slots[~good])
        finally:
            with self._shelf.changed:
                self._shelf.disk.release(slots)
        num_corrupt, num_unreadable = int(np.count_nonzero(readable & ~good)), int(np.count_nonzero(~readable))
        self._shelf.counters.count_verified_bad(num_corrupt, num_unreadable)
        return num_gone, num_corrupt, num_unreadable

    def _compare(self, keys: list[BlockKey], slots: SlotIds, rows: Rows) -> tuple[Outcomes, Outcomes, Outcomes]:
        """Which blocks are still where they were after the look at them; which could be read; which are right."""
        row_ids = np.arange(len(keys), dtype=np.int64)
        with self._shelf.changed:
            there = self._are_there(keys, slots)
            expected = self._shelf.disk_digests[np.where(there, slots, 0)]
        readable = np.zeros(len(keys), dtype=np.bool_)
        readable[there] = self._disk.read(slots[there], rows, row_ids[there])
        digests = digest_rows(rows, row_ids, digest_seeds(keys), self._layout.block_bytes)
        with self._shelf.changed:
            there &= self._are_there(keys, slots)
        return there, readable, readable & (digests == expected)

    def _are_there(self, keys: list[BlockKey], slots: SlotIds) -> Outcomes:
        """The caller holds the shelf's lock."""
        find: Callable[[BlockKey], int | None] = self._shelf.disk.find
        return np.array([find(key) == slot for key, slot in zip(keys, slots.tolist(), strict=True)], dtype=np.bool_)


def _verification(
    num_blocks: int, found: list[tuple[int, int, int]], num_done: int, started_s: float, *, is_complete: bool
) -> Verification:
    gone, corrupt, unreadable = (sum(counts) for counts in zip(*found, strict=True)) if found else (0, 0, 0)
    return Verification(
        num_blocks=num_blocks,
        num_checked=num_done - gone,
        num_gone=gone,
        num_corrupt=corrupt,
        num_unreadable=unreadable,
        seconds=time.monotonic() - started_s,
        is_complete=is_complete,
    )
