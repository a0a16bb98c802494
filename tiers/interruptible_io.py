"""Reads in small calls that can be given up between any two of them, for somebody who only looks at a disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from dynamo.kernels.checks import Rows, SlotIds
from dynamo.tiers.block_file import BlockFile
from dynamo.tiers.slot_batch import PendingBatch, SlotBatch
from dynamo.tiers.slot_io import PendingIO

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_CALL_BYTES", "InterruptibleIO"]

MAX_CALL_BYTES = 256 << 10
"""Moved by a call at most, also where a slot is larger: nobody waits for more, however slow the disk."""


class InterruptibleIO:
    """A `SlotIO` of host memory that works on its caller's thread, one small call after the other. Owns nothing."""

    def __init__(self, check: Callable[[], None]) -> None:
        """`check` is called before each call to the system; what it raises, no OSError, ends all and reaches the caller."""
        self._check = check

    def start(
        self, file: BlockFile, slots: SlotIds, rows: Rows | torch.Tensor, row_ids: SlotIds, *, writes: bool
    ) -> PendingIO:
        """Begins a read or write; see `SlotIO.start`."""
        batch = SlotBatch.of(file, slots, rows, row_ids, 1, writes)
        batch.call = partial(self._call, batch.call)
        return PendingBatch(batch)

    def close(self) -> None:
        """Does nothing: there are no threads."""

    def _call(
        self, call: Callable[[int, list[memoryview], int], int], fd: int, vectors: list[memoryview], offset: int
    ) -> int:
        """The first bytes only; the batch asks for the others as for those of any short read."""
        self._check()
        first: list[memoryview] = []
        left_bytes = MAX_CALL_BYTES
        for vector in vectors:
            first.append(vector[:left_bytes])
            left_bytes -= len(first[-1])
            if not left_bytes:
                break
        return call(fd, first, offset)
