"""Looks for blocks on disk whose bytes are no longer those that were written, while the cache goes on serving.

There is one way to look, and two who do: `KVCache.verify`, as fast as the disk allows and in one go, and a scrubber in the
background, slowly and only when nobody else uses the disk.

Blocks are read a few at a time into memory of the check's own, in the order they lie on disk, and compared with their
digests. They are not pinned for it: that would put them in front of all others in the order of eviction. A block that
looks wrong may therefore just have made way for another; only those are pinned, read again, and believed the second time.
"""

import logging
import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.shelf import Shelf, digest_seeds
from dynamo.kvcache.status import Verification
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierClosedError
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.scrub import Scrubber, ScrubStats, ScrubStep
from dynamo.tiers.slot_digests import match_digests
from dynamo.tiers.tier import Outcomes, Rows, SlotIds

__all__ = ["DiskVerifier"]

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 30.0
_WINDOW_SLOTS = 1 << 16  # looked through at a time for blocks: loads wait for the shelf's lock
_SCRUB_BYTES = 4 << 20  # read at a time in the background: a load that comes just then waits a millisecond or two
_MIN_SCRUB_BLOCKS = 4  # of blocks that are read together, one that cannot be read stands out


@dataclass(frozen=True, slots=True)
class _Look:
    """At some blocks: bool [n] each. Still there when it was over; could be read; have the bytes they were written with."""

    there: Outcomes
    readable: Outcomes
    good: Outcomes

    @property
    def num_gone(self) -> int:
        return int(np.count_nonzero(~self.there))


@dataclass(frozen=True, slots=True)
class _Reading:
    """Memory to read into, and what is asked before each small read; None: all is read at once."""

    rows: Rows
    check: Callable[[], None] | None


class DiskVerifier:
    """Checks the blocks on disk, when told to on the caller's thread, else in the background. One check at a time.

    Owns the scrubber. Thread-safe.
    """

    def __init__(
        self, shelf: Shelf, disk: DiskTier, layout: BlockLayout, *, part_blocks: int, scrub_bytes_per_s: float
    ) -> None:
        """Starts to check in the background.

        Args:
            part_blocks: blocks read at a time when told to check, which bounds the memory that takes.
            scrub_bytes_per_s: read in the background at most; 0: nothing.
        """
        self._shelf = shelf
        self._disk = disk
        self._layout = layout
        self._part_blocks = part_blocks
        self._running = threading.Lock()  # held by the check that runs
        self._is_closing = False
        self._num_suspects = 0
        self._is_warned = False
        self._scrubber: Scrubber | None = None
        if scrub_bytes_per_s:
            rows = self._new_rows(max(_MIN_SCRUB_BLOCKS, _SCRUB_BYTES // layout.slot_bytes))
            self._scrub_reading = _Reading(rows, self._check_open)
            self._scrubber = Scrubber(disk, self._scrub, bytes_per_s=scrub_bytes_per_s)

    @property
    def num_suspects(self) -> int:
        """Blocks that looked wrong and are pinned for a second look."""
        return self._num_suspects

    @property
    def scrub_stats(self) -> ScrubStats | None:
        """How far the check in the background has come; None without one."""
        return self._scrubber.stats if self._scrubber else None

    def run(self, timeout_s: float) -> Verification:
        """Checks what lies on disk now, for at most `timeout_s`; waits for another check to end first, within that time.

        Raises:
            TierClosedError: the cache was closed meanwhile.
        """
        started_s = time.monotonic()
        if not self._running.acquire(timeout=timeout_s):
            return _verification(len(self._shelf.disk), [], started_s, is_complete=False)
        try:
            return self._run(started_s, started_s + timeout_s)
        finally:
            self._running.release()

    def close(self) -> None:
        """Ends all checks, and waits for what they are reading: 256 KiB in the background, else `part_blocks` blocks."""
        self._is_closing = True
        if self._scrubber:
            self._scrubber.close(_CLOSE_TIMEOUT_S)
        if self._running.acquire(timeout=_CLOSE_TIMEOUT_S):
            self._running.release()

    def _run(self, started_s: float, deadline: float) -> Verification:
        num_blocks = len(self._shelf.disk)
        reading = _Reading(self._new_rows(self._part_blocks), None)
        found: list[tuple[int, int, int, int]] = []
        slot: int | None = 0
        while slot is not None and time.monotonic() < deadline:
            self._check_open()
            keys, slots, slot = self._blocks_from(slot, len(reading.rows))
            if keys:
                look = self._look(keys, slots, reading)
                found.append((len(keys), look.num_gone, *self._look_again(look, keys, slots, reading)))
        return _verification(num_blocks, found, started_s, is_complete=slot is None)

    def _scrub(self, first: int) -> ScrubStep | None:
        """One step of the check in the background; None while another check runs.

        Where nothing at all can be read, the disk as a whole may have a bad moment, and its blocks are not given up for it.
        """
        if not self._running.acquire(blocking=False):
            return None
        try:
            reading = self._scrub_reading
            keys, slots, next_slot = self._blocks_from(first, len(reading.rows))
            if not keys:
                return ScrubStep(0, 0, next_slot)
            look = self._look(keys, slots, reading)
            if look.readable.any():
                num_corrupt, num_unreadable = self._look_again(look, keys, slots, reading)
                if num_corrupt + num_unreadable and not self._is_warned:
                    self._is_warned = True
                    logger.warning(
                        "a check in the background found %d KV blocks on disk that do not match their digests and %d that "
                        "cannot be read; they are forgotten, and further ones only counted",
                        num_corrupt,
                        num_unreadable,
                    )
            return ScrubStep(
                int(np.count_nonzero(look.readable & look.there)), len(keys) * self._layout.slot_bytes, next_slot
            )
        finally:
            self._running.release()

    def _new_rows(self, num_rows: int) -> Rows:
        """Page-aligned memory, uint8 [num_rows, slot_bytes]."""
        memory = np.frombuffer(mmap.mmap(-1, num_rows * self._layout.slot_bytes), dtype=np.uint8)
        return memory.reshape(num_rows, self._layout.slot_bytes)

    def _blocks_from(self, first: int, count: int) -> tuple[list[BlockKey], SlotIds, int | None]:
        """Up to `count` blocks in slots from `first` on, and the slot to go on from; None after the last."""
        disk = self._shelf.disk
        with self._shelf.changed:
            end = first + _WINDOW_SLOTS
            keys, slots = disk.blocks_in(first, end, count)
            if len(keys) == count:
                end = int(slots[-1]) + 1
            return keys, slots, end if end < disk.num_slots else None

    def _look(self, keys: list[BlockKey], slots: SlotIds, reading: _Reading) -> _Look:
        row_ids = np.arange(len(keys), dtype=np.int64)
        with self._shelf.changed:
            there = self._are_there(keys, slots)
            known = np.where(there, slots, 0)
            digests, kinds = self._shelf.disk_digests[known], self._shelf.disk_digest_kinds[known]
        readable = np.zeros(len(keys), dtype=np.bool_)
        try:
            readable[there] = self._disk.inspect(slots[there], reading.rows, row_ids[there], reading.check)
        except KernelArgumentError:  # the tier was made smaller meanwhile, and these blocks are gone
            there[:] = False
        matching = match_digests(reading.rows, row_ids, digest_seeds(keys), self._layout.block_bytes, digests, kinds)
        with self._shelf.changed:
            there &= self._are_there(keys, slots)
        return _Look(there, readable, readable & matching)

    def _look_again(self, look: _Look, keys: list[BlockKey], slots: SlotIds, reading: _Reading) -> tuple[int, int]:
        """How many of the blocks are really corrupt, and unreadable. Forgets and counts those."""
        suspects = np.flatnonzero(look.there & ~look.good)
        if not len(suspects):
            return 0, 0
        shelf = self._shelf
        keys, slots = [keys[place] for place in suspects.tolist()], slots[suspects]
        with shelf.changed:
            there = self._are_there(keys, slots)
            keys, slots = [key for key, is_there in zip(keys, there, strict=True) if is_there], slots[there]
            self._num_suspects = len(slots)
            shelf.disk.acquire(slots)
        try:
            look = self._look(keys, slots, reading)
            if look.good.all() or shelf.notice_lost_disk() or self._is_closing:
                return 0, 0
            bad = [key for key, is_good in zip(keys, look.good.tolist(), strict=True) if not is_good]
            shelf.forget_on_disk(bad, slots[~look.good])
        finally:
            with shelf.changed:
                shelf.disk.release(slots)
                self._num_suspects = 0
                shelf.changed.notify_all()
        num_corrupt = int(np.count_nonzero(look.readable & ~look.good))
        num_unreadable = int(np.count_nonzero(~look.readable))
        shelf.counters.count_verified_bad(num_corrupt, num_unreadable)
        return num_corrupt, num_unreadable

    def _check_open(self) -> None:
        if self._is_closing:
            raise TierClosedError("the cache was closed while its blocks on disk were checked")

    def _are_there(self, keys: list[BlockKey], slots: SlotIds) -> Outcomes:
        """The caller holds the shelf's lock."""
        is_there: Outcomes = self._shelf.disk.locate(keys) == slots
        return is_there


def _verification(
    num_blocks: int, found: list[tuple[int, int, int, int]], started_s: float, *, is_complete: bool
) -> Verification:
    seen, gone, corrupt, unreadable = (sum(counts) for counts in zip(*found, strict=True)) if found else (0, 0, 0, 0)
    return Verification(
        num_blocks=num_blocks,
        num_checked=seen - gone,
        num_gone=gone,
        num_corrupt=corrupt,
        num_unreadable=unreadable,
        seconds=time.monotonic() - started_s,
        is_complete=is_complete,
    )
