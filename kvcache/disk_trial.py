"""Reads a few blocks when a cache is opened, so that the first prompt need not find out how fast the disk is."""

import logging
import threading
import time

import numpy as np

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kvcache.planner import LoadPlanner
from dynamo.kvcache.shelf import Shelf
from dynamo.tiers.arena import map_rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierError
from dynamo.tiers.tier import Rows, SlotIds

__all__ = ["DiskTrial"]

logger = logging.getLogger(__name__)

_TRIAL_BYTES = 256 << 10
_WINDOW_SLOTS = 1 << 16  # looked through for blocks
_TIMEOUT_S = 10.0  # what takes so long is slow


class DiskTrial:
    """Measures how fast blocks of an earlier run come from disk, and tells the planner. Owns a thread while it does.

    One block is read for how long the disk takes to answer, then others for its speed: none twice, since a cache on the way
    would answer for it, and one small call after the other, so that a trial flatters no disk.
    """

    def __init__(self, shelf: Shelf, disk: DiskTier, planner: LoadPlanner) -> None:
        """Starts. Nothing is done where there is nothing to read."""
        self._disk = disk
        self._planner = planner
        self._is_closing = False
        self._thread: threading.Thread | None = None
        num_blocks = max(2, _TRIAL_BYTES // disk.layout.slot_bytes)
        with shelf.changed:
            _, slots = shelf.disk.blocks_in(0, _WINDOW_SLOTS, num_blocks)
        if len(slots):
            planner.begin_trial("disk")
            self._thread = threading.Thread(target=self._run, args=(slots,), name="kvcache-disk-trial", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Ends the trial and waits for what it is reading, 256 KiB."""
        self._is_closing = True
        if self._thread:
            self._thread.join(timeout_s)

    def _run(self, slots: SlotIds) -> None:
        rows = map_rows(self._disk.layout, len(slots))
        try:
            answer_s = self._read(slots[:1], rows)
            block_s = self._read(slots[1:], rows) / (len(slots) - 1) if len(slots) > 1 else answer_s
        except _TooSlowError:
            self._planner.observe_trial("disk", 1, _TIMEOUT_S, 0.0)  # how many had come is not known
        except (TierError, KernelArgumentError, _NotReadError) as error:  # closed, damaged or made smaller meanwhile
            logger.debug("the disk was not tried: %s", error)
        else:
            self._planner.observe_trial("disk", len(slots), len(slots) * block_s, max(0.0, answer_s - block_s))
        finally:
            self._planner.end_trial("disk")

    def _read(self, slots: SlotIds, rows: Rows) -> float:
        """Returns the seconds it took."""
        started_s = time.monotonic()

        def check() -> None:
            if self._is_closing:
                raise _NotReadError("the cache is being closed")
            if time.monotonic() > started_s + _TIMEOUT_S:
                raise _TooSlowError

        if not self._disk.inspect(slots, rows, np.arange(len(slots)), check).all():
            raise _NotReadError("a block could not be read")
        return time.monotonic() - started_s


class _NotReadError(Exception):
    """There is nothing to be learned."""


class _TooSlowError(Exception):
    """Enough time was spent to know that. No TimeoutError, which would pass for one of the disk's."""
