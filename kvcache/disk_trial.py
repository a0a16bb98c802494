"""Reads a few blocks when a cache is opened, so that the first prompt need not find out how fast the disk is.

Two reads, one after the other: of some blocks together, for the disk's speed, and of one, for how long it takes to answer.
"""

import logging
from functools import partial

import numpy as np

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kvcache.planner import LoadPlanner
from dynamo.kvcache.shelf import Shelf
from dynamo.tiers.arena import map_rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierError
from dynamo.tiers.mover import Mover, Part
from dynamo.tiers.tier import Rows, SlotIds
from dynamo.tiers.transfer import Transfer

__all__ = ["start_trial"]

logger = logging.getLogger(__name__)

_LOAD_NUMBER = -1  # of no load
_TRIAL_BYTES = 256 << 10  # or one block: whoever closes the cache meanwhile waits for one such read
_WINDOW_SLOTS = 1 << 16  # looked through for blocks
_TIMEOUT_S = 10.0  # what takes so long is slow


def start_trial(shelf: Shelf, disk: DiskTier, mover: Mover, planner: LoadPlanner) -> Transfer | None:
    """Starts to measure how fast blocks of an earlier run come from disk, and tells `planner`.

    Returns:
        What ends the trial, which the caller cancels before the mover is closed. None where there is nothing to read.
    """
    layout = disk.layout
    with shelf.changed:
        _, slots = shelf.disk.blocks_in(0, _WINDOW_SLOTS, max(1, _TRIAL_BYTES // layout.slot_bytes))
    if not len(slots):
        return None
    rows = map_rows(layout, len(slots))
    trial = Transfer(0, _TIMEOUT_S)
    planner.begin_trial("disk")
    parts = [
        Part(partial(_read, disk, planner, some, rows), len(some) * layout.block_bytes) for some in (slots, slots[:1])
    ]
    mover.submit(trial, {"disk": parts}, lambda: planner.end_trial("disk"), at_once=1)
    return trial


def _read(disk: DiskTier, planner: LoadPlanner, slots: SlotIds, rows: Rows) -> None:
    num_read = 0
    planner.begin_part("disk")
    try:
        num_read = int(np.count_nonzero(disk.inspect(slots, rows, np.arange(len(slots)))))
    except (TierError, KernelArgumentError) as error:  # closed, or made smaller, meanwhile
        logger.debug("the disk was not tried: %s", error)
    finally:
        planner.end_part("disk", _LOAD_NUMBER, len(slots), num_read)
