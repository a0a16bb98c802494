"""What moves slots between a file and memory, whichever way: the seam below a disk tier's stripes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dynamo.kernels.checks import Rows, SlotIds
from dynamo.tiers.block_file import BlockFile
from dynamo.tiers.tier import Outcomes

if TYPE_CHECKING:
    import torch

__all__ = ["IOResult", "PendingIO", "SlotIO"]


@dataclass(frozen=True, slots=True)
class IOResult:
    """What became of one call.

    Attributes:
        outcomes: bool [n], in the order of the slots asked for.
        faults: failed slots by kind: "truncated" (the file ends before the slot does), "disk_full", "quota_exceeded",
            "read_only", "no_permission", "io_error"; and "direct_refused" once when O_DIRECT stopped working and the file
            went on buffered.
    """

    outcomes: Outcomes
    faults: Mapping[str, int]


class SlotIO(Protocol):
    """A way to move slots between one file and rows of memory. Calls may come from any thread."""

    def start(
        self, file: BlockFile, slots: SlotIds, rows: Rows | torch.Tensor, row_ids: SlotIds, *, writes: bool
    ) -> PendingIO:
        """Begins to move `slots` of the file into rows, or rows to slots; slot i lies at `i * row_bytes`.

        Args:
            file: where the slots lie; stays open until `PendingIO.result`.
            slots: int64 [n], distinct, not negative.
            rows: uint8 [num_rows, row_bytes], C-contiguous and page-aligned, row_bytes a multiple of 4096; in the memory
                that this back-end is for.
            row_ids: int64 [n], within the rows.
            writes: whether rows go to the file. Not durable: nothing is synced.

        Raises:
            KernelArgumentError: the rows are not aligned, or not in the right memory.
        """

    def close(self) -> None:
        """Ends the threads after what they are at. Idempotent."""


class PendingIO(Protocol):
    """A read or write under way."""

    def result(self) -> IOResult:
        """Helps, then blocks until the kernel is done with the rows; call once.

        There is no deadline: memory that a stuck disk may still write to cannot be given back to anybody.
        """
