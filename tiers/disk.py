"""G3: slots in preallocated files of one or several directories, found again after a restart through a journal."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from dynamo.kernels.checks import KernelArgumentError, Rows, SlotIds, check_ids, check_rows
from dynamo.tiers.disk_faults import fault_reporter
from dynamo.tiers.disk_space import describe_shortage, why_unusable
from dynamo.tiers.errors import TierConfigError, TierUnavailableError
from dynamo.tiers.interruptible_io import InterruptibleIO
from dynamo.tiers.journal import Journal
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.queued_io import QueuedIO
from dynamo.tiers.recovered import RecoveredBlocks
from dynamo.tiers.slot_batch import check_aligned
from dynamo.tiers.slot_io import SlotIO
from dynamo.tiers.stats import TierRecorder, TierStats
from dynamo.tiers.stripe import FaultReport, Generations, IOTarget
from dynamo.tiers.stripe_set import StripePlan, StripeSet
from dynamo.tiers.tier import Outcomes
from dynamo.tiers.write_budget import WriteBudget, WriteBudgetStats, least_bytes_per_day

if TYPE_CHECKING:  # these load torch, which the rest of the tier does without
    import torch

    from dynamo.tiers.kvikio_io import GdsProof, Kvikio, KvikioIO

__all__ = ["DiskTier"]

logger = logging.getLogger(__name__)


class DiskTier:
    """Slots striped over `blocks.dat` of one or several folders, each locked against other processes, and a `Journal`.

    Slot `s` lies in directory `s % n` at place `s // n`, so that the slots of one prefix keep all devices busy and still are
    consecutive on each of them. Owns folders, files, index and I/O threads. Knows nothing of names: whoever writes a block
    calls `journal.put` when `write` has succeeded, `journal.drop` before a slot goes to another block, and checks digests of
    what `read` gives.

    What a read gives is one content of its slot, whole: see `Stripe` for the argument, `generations` for the numbers. That
    it is the content meant is for the digest to say, which is seeded with the block's key.

    Files grow in extents as higher slots are first used, so use low slots first. Faults are counted by kind in
    `stats().faults` and logged at the first of each kind.

    Attributes:
        write_budget: what may be written; None without limit. `write` refuses what goes beyond it.
    """

    name = "disk"

    def __init__(
        self,
        stripes: StripeSet,
        layout: BlockLayout,
        num_slots: int,
        recorder: TierRecorder,
        report: FaultReport,
        write_budget: WriteBudget | None,
    ) -> None:
        """Takes over what it is given; use `open`."""
        self.layout = layout
        self.write_budget = write_budget
        self._num_slots = num_slots
        self._stripes = stripes
        self._recorder = recorder
        self._report = report
        self._resizing = Lock()
        self._counting = Lock()  # guards the two below
        self._num_calls = 0
        self._device_io: KvikioIO | None = None
        self._last_use_s = time.monotonic()

    @classmethod
    def open(
        cls,
        directories: Path | Sequence[Path],
        layout: BlockLayout,
        capacity_bytes: int,
        fingerprint: bytes,
        io_threads: int = 16,
        *,
        write_bytes_per_day: int | None = None,
        new_io: Callable[[int], SlotIO] = QueuedIO,
    ) -> DiskTier:
        """Opens, or creates, the folder of one model inside each of `directories`.

        Args:
            directories: one, or several on different devices, always in the same order; the index lies in the first. May be
                shared with other models' tiers; created where needed.
            layout: sizes of a block.
            capacity_bytes: what all models in `directories` may take together, in equal shares. Folders of models not in
                use, the least recently used first, make way when this one grows.
            fingerprint: names model, dtype and layout; blocks of another fingerprint are never seen.
            io_threads: calls in flight at each device where there is no asynchronous I/O.
            write_bytes_per_day: how much may be written in a day, an hour's share of it at once; None for no limit.
            new_io: makes the I/O back-end of a directory, given the number of threads.

        Raises:
            TierConfigError: the capacity does not hold one block in each directory, a directory is given twice, or the write
                budget lets no block be written.
            TierBusyError: another process uses a folder.
            TierUnavailableError: a folder cannot be created, read or written, or is not this tier's; go on without a disk
                tier.
        """
        directories = [directories] if isinstance(directories, Path) else list(directories)
        _check_directories(directories)
        stripe_slots = capacity_bytes // len(directories) // layout.slot_bytes
        if stripe_slots < 1:
            raise TierConfigError(
                f"a disk capacity of {capacity_bytes} bytes over {len(directories)} directories holds no block of "
                f"{layout.slot_bytes} bytes in each; give it more"
                if len(directories) > 1
                else f"a disk capacity of {capacity_bytes} bytes holds no block of {layout.slot_bytes} bytes; give it more"
            )
        if write_bytes_per_day is not None and write_bytes_per_day < least_bytes_per_day(layout.slot_bytes):
            raise TierConfigError(
                f"a write budget of {write_bytes_per_day} bytes a day lets no block of {layout.slot_bytes} bytes be written; "
                f"give at least {least_bytes_per_day(layout.slot_bytes)}"
            )
        recorder = TierRecorder(layout.block_bytes)
        report = fault_reporter(recorder, directories)
        plan = StripePlan(
            directories,
            fingerprint,
            layout,
            stripe_slots,
            capacity_bytes // len(directories),
            lambda: new_io(io_threads),
            report,
        )
        try:
            stripes = StripeSet.open(plan)
        except OSError as error:
            raise TierUnavailableError(
                why_unusable(directories, error),
                path=Path(str(error.filename or directories[0])),
            ) from error
        if (shortage := describe_shortage(directories, capacity_bytes)) is not None:
            logger.warning("%s", shortage)
        budget = None
        if write_bytes_per_day is not None:
            budget = WriteBudget(write_bytes_per_day, stripes.stripes[0].namespace.budget_path)
        return cls(stripes, layout, stripe_slots * len(directories), recorder, report, budget)

    @property
    def num_slots(self) -> int:
        """Slots are numbered [0, num_slots)."""
        return self._num_slots

    @property
    def folder(self) -> Path:
        """This model's folder in the first directory."""
        return self.folders[0]

    @property
    def folders(self) -> list[Path]:
        """This model's folder in each directory."""
        return [stripe.namespace.folder for stripe in self._stripes.stripes]

    @property
    def journal(self) -> Journal:
        """The index."""
        return self._stripes.journal

    @property
    def recovered(self) -> RecoveredBlocks:
        """Blocks of an earlier run that lie within the files, least recently put first. Their bytes are not checked yet."""
        return self._stripes.recovered

    def release_recovered(self) -> None:
        """Frees the memory of `recovered`, 57 bytes a block, once its reader is done; it is empty from now on."""
        self._stripes.release_recovered()

    @property
    def generation(self) -> int:
        """Goes up when everything stored was lost (the only file was deleted): forget the index of this tier then.

        Of several files the others still hold theirs: reads of lost slots fail, block by block.
        """
        return self._stripes.num_losses

    @property
    def num_allocated_slots(self) -> int:
        """Slots, from the first on, for which the files have room already; others may be refused when a disk is full."""
        return min(self._stripes.num_whole_slots, self._num_slots)

    @property
    def idle_s(self) -> float:
        """Seconds since the last read or write ended; 0 while one runs."""
        with self._counting:
            return 0.0 if self._num_calls else time.monotonic() - self._last_use_s

    def generations(self, slots: SlotIds) -> Generations:
        """A number for what each slot holds now, uint64 [n]; 0 for nothing. It changes whenever the slot is written.

        Raises:
            KernelArgumentError: ids do not fit.
        """
        check_ids(slots, "slots", self._num_slots)
        return self._stripes.generations(slots)

    def read(self, slots: SlotIds, rows: Rows, row_ids: SlotIds, *, generations: Generations | None = None) -> Outcomes:
        """Reads slots into rows; see `Tier.read`.

        Also False for slots not written since their file was made, for slots that were written to while they were read, and,
        given `generations`, uint64 [n], for slots that hold something else than they did when those were asked for.
        """
        self._check(slots, rows, row_ids, writable=True)
        started = time.perf_counter()
        with self._counted():
            outcomes = self._stripes.read(slots, IOTarget(rows), row_ids, generations)
        num_good = int(np.count_nonzero(outcomes))
        self._recorder.add_read(num_good, slots.size - num_good, time.perf_counter() - started)
        return outcomes

    def inspect(
        self, slots: SlotIds, rows: Rows, row_ids: SlotIds, check: Callable[[], None] | None = None
    ) -> Outcomes:
        """Reads like `read` for somebody who only looks: neither counted as a read nor as use of the disk.

        Args:
            check: called before every 256 KiB, which are then read one after the other; what it raises ends the reading.
                None: all is read at once, as fast as the disk can.
        """
        self._check(slots, rows, row_ids, writable=True)
        io = None if check is None else InterruptibleIO(check)
        return self._stripes.read(slots, IOTarget(rows, io), row_ids, None)

    def write(self, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> Outcomes:
        """Writes rows to slots; see `Tier.write`. Not synced: after a power cut digests tell what is good.

        Also False for slots at the end of the call that the write budget does not allow; those keep what they held.
        """
        self._check(slots, rows, row_ids)
        return self._write(slots, IOTarget(rows), row_ids)

    def affordable(self, num_blocks: int) -> int:
        """How many of so many blocks the write budget allows now; counts the others as refused.

        For a writer that gives other blocks up to make room, and should not for writes that will be refused.
        """
        budget = self.write_budget
        if budget is None:
            return num_blocks
        allowed = min(num_blocks, budget.available_bytes // self.layout.slot_bytes)
        if allowed < num_blocks:
            self._report("write_budget", num_blocks - allowed, "")
        return allowed

    def prove_gds(self, device: torch.device, kvikio: Kvikio | None = None) -> list[GdsProof]:
        """Tries GPUDirect Storage between `device` and every directory; where all prove it, `has_device_io` is true from now.

        Says in the log what was found. Call it once, before reads and writes of device memory.
        """
        from dynamo.tiers.kvikio_io import GdsProof, KvikioIO, find_kvikio, prove_gds

        found = find_kvikio() if kvikio is None else kvikio
        if isinstance(found, str):
            proofs = [GdsProof(False, found)] * len(self.folders)
        else:
            proofs = [prove_gds(folder, device, found) for folder in self.folders]
            if all(proof.ok for proof in proofs):
                self._device_io = KvikioIO(found)
        for folder, proof in zip(self.folders, proofs, strict=True):
            verdict = "proven" if proof.ok else "not proven"
            logger.info("disk tier %s: GPUDirect Storage is %s: %s", folder, verdict, proof.reason)
        return proofs

    @property
    def has_device_io(self) -> bool:
        """Whether `read_device` and `write_device` may be used: GPUDirect Storage was proven in every directory."""
        return self._device_io is not None

    def read_device(
        self, slots: SlotIds, rows: torch.Tensor, row_ids: SlotIds, *, generations: Generations | None = None
    ) -> Outcomes:
        """Reads slots into rows of device memory, uint8 [num_rows, slot_bytes], contiguous; otherwise as `read`.

        Raises:
            TierConfigError: GPUDirect Storage is not proven here.
        """
        target = self._device_target(slots, rows, row_ids)
        started = time.perf_counter()
        with self._counted():
            outcomes = self._stripes.read(slots, target, row_ids, generations)
        num_good = int(np.count_nonzero(outcomes))
        self._recorder.add_read(num_good, slots.size - num_good, time.perf_counter() - started)
        return outcomes

    def write_device(self, slots: SlotIds, rows: torch.Tensor, row_ids: SlotIds) -> Outcomes:
        """Writes rows of device memory to slots, after `torch.cuda.synchronize` or an event; otherwise as `write`.

        Raises:
            TierConfigError: GPUDirect Storage is not proven here.
        """
        return self._write(slots, self._device_target(slots, rows, row_ids), row_ids)

    def _device_target(self, slots: SlotIds, rows: torch.Tensor, row_ids: SlotIds) -> IOTarget:
        if self._device_io is None:
            raise TierConfigError("GPUDirect Storage is not proven for this disk tier; go through host memory")
        check_ids(slots, "slots", self._num_slots)
        check_ids(row_ids, "row_ids", rows.shape[0], slots.size)
        if rows.shape[1:] != (self.layout.slot_bytes,):
            raise KernelArgumentError(f"rows have shape {tuple(rows.shape)}, {self.layout.slot_bytes} bytes are needed")
        return IOTarget(rows, self._device_io)

    def _write(self, slots: SlotIds, target: IOTarget, row_ids: SlotIds) -> Outcomes:
        started = time.perf_counter()
        outcomes = np.zeros(slots.size, dtype=np.bool_)
        num_allowed = self._allowed(slots.size)
        with self._counted():
            outcomes[:num_allowed] = self._stripes.write(slots[:num_allowed], target, row_ids[:num_allowed])
        num_good = int(np.count_nonzero(outcomes))
        if self.write_budget and num_good < num_allowed:
            self.write_budget.give_back((num_allowed - num_good) * self.layout.slot_bytes)
        self._recorder.add_write(num_good, slots.size - num_good, time.perf_counter() - started)
        return outcomes

    def resize(self, num_slots: int) -> None:
        """Changes the number of slots while in use. What lies beyond is lost and its space given back.

        Call it when nobody uses slots beyond any more: not for a read, a write, nor in the index above.

        Raises:
            TierConfigError: less than one slot in each directory.
            TierClosedError: the tier is closed.
        """
        if num_slots < len(self._stripes.stripes):
            raise TierConfigError(
                f"a disk tier of {num_slots} slots leaves a directory empty; give at least {len(self._stripes.stripes)}"
            )
        with self._resizing:
            if num_slots < self._num_slots:
                self._num_slots = num_slots
            self._stripes.resize(num_slots)
            grows, self._num_slots = num_slots > self._num_slots, num_slots
        if grows and (shortage := self.describe_shortage()) is not None:
            logger.warning("%s", shortage)

    def describe_shortage(self) -> str | None:
        """What the file systems lack for as many blocks as the tier may hold, and the way out; None for nothing."""
        directories = [stripe.namespace.directory for stripe in self._stripes.stripes]
        return describe_shortage(directories, self._num_slots * self.layout.slot_bytes)

    def stats(self) -> TierStats:
        """Counters; `path` is "O_DIRECT", "buffered" or "unavailable", the worst of all directories."""
        return self._recorder.snapshot(self.name, self._num_slots, self._stripes.path)

    def budget_stats(self) -> WriteBudgetStats | None:
        """What was written against the write budget, and refused because of it; None without one."""
        budget, stats = self.write_budget, self.stats()
        if budget is None:
            return None
        return WriteBudgetStats(
            bytes_per_day=budget.bytes_per_day,
            burst_bytes=int(budget.burst_bytes),
            available_bytes=max(0, budget.available_bytes),
            written_bytes=stats.write.blocks * self.layout.slot_bytes,
            refused_blocks=stats.faults.get("write_budget", 0),
        )

    def close(self) -> None:
        """Waits up to 30 s for calls in progress, closes the index and gives the locks back. Idempotent."""
        if self.write_budget:
            self.write_budget.close()
        self._stripes.close()
        if self._device_io:
            self._device_io.close()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._counting:
            self._num_calls += 1
        try:
            yield
        finally:
            with self._counting:
                self._num_calls -= 1
                self._last_use_s = time.monotonic()

    def _check(self, slots: SlotIds, rows: Rows, row_ids: SlotIds, *, writable: bool = False) -> None:
        check_rows(rows, "rows", self.layout.slot_bytes, writable=writable)
        check_ids(slots, "slots", self._num_slots)
        check_ids(row_ids, "row_ids", rows.shape[0], slots.size)
        check_aligned(rows)

    def _allowed(self, num_blocks: int) -> int:
        """How many of the blocks of a write the budget allows, which takes them out of it."""
        if self.write_budget is None:
            return num_blocks
        granted = self.write_budget.take(num_blocks, self.layout.slot_bytes)
        if granted < num_blocks:
            self._report("write_budget", num_blocks - granted, "")
        return granted


def _check_directories(directories: Sequence[Path]) -> None:
    if not directories:
        raise TierConfigError("a disk tier needs at least one directory")
    real = [os.path.realpath(directory) for directory in directories]
    for i, directory in enumerate(directories):
        if real[i] in real[:i]:
            other = directories[real.index(real[i])]
            same = "" if other == directory else f", which is {other},"
            raise TierConfigError(f"the disk tier's directory {directory}{same} is given twice; give each once")
