"""Vectored reads and writes of slots in one file, spread over a thread pool."""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread
from typing import TYPE_CHECKING

from dynamo.kernels.checks import Rows, SlotIds
from dynamo.tiers.block_file import BlockFile
from dynamo.tiers.slot_batch import PendingBatch, SlotBatch
from dynamo.tiers.slot_io import IOResult, PendingIO

if TYPE_CHECKING:
    import torch

__all__ = ["FileIO"]


class FileIO:
    """Threads that read and write slots. Batches of different callers take turns, so none waits for another's end.

    A caller works on its own batch too: a single call needs no hand-over, and a batch ends even after `close`.
    """

    def __init__(self, num_threads: int) -> None:
        """Starts `num_threads` - at least 1 - daemon threads."""
        self.num_threads = max(1, num_threads)
        self._batches: deque[SlotBatch] = deque()
        self._wake = Condition()
        self._closed = False
        self._threads = [Thread(target=self._work, name=f"kv-disk-{i}", daemon=True) for i in range(self.num_threads)]
        for thread in self._threads:
            thread.start()

    def start(
        self, file: BlockFile, slots: SlotIds, rows: Rows | torch.Tensor, row_ids: SlotIds, *, writes: bool
    ) -> PendingIO:
        """Begins a read or write; see `SlotIO.start`."""
        return self.start_batch(SlotBatch.of(file, slots, rows, row_ids, self.num_threads, writes))

    def start_batch(self, batch: SlotBatch) -> PendingBatch:
        """Shares a batch out among the threads."""
        if batch.num_shares > 1:
            with self._wake:
                self._batches.append(batch)
                self._wake.notify(batch.num_shares - 1)
        return PendingBatch(batch)

    def read(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> IOResult:
        """Reads `slots` of the file into rows and waits for them; as `start`."""
        return self.start(file, slots, rows, row_ids, writes=False).result()

    def write(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> IOResult:
        """Writes rows to `slots` of the file and waits for them; as `start`."""
        return self.start(file, slots, rows, row_ids, writes=True).result()

    def close(self) -> None:
        """Ends the threads after the calls they are working on; callers finish their own batches. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._batches and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                batch = self._batches.popleft()
                try:
                    first = batch.shares.popleft()
                except IndexError:
                    continue
                if batch.shares:
                    self._batches.append(batch)
            batch.run(first)
            del batch  # an idle thread must not keep the rows' memory
