"""Anonymous memory that tiers are made of: one mmap seen as numpy rows, of which any part may be resident."""

import contextlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from dynamo.kernels.checks import Rows
from dynamo.tiers.errors import TierMemoryError
from dynamo.tiers.layout import BlockLayout

__all__ = ["Arena", "ResidentPages", "map_rows", "prefault", "resident_pages"]

_MAP_NORESERVE = 0x4000  # Linux's, on x86-64 and ARM; Python's mmap module does not name it
_PREFAULT_STEP_BYTES = 64 << 20
_MAX_PREFAULT_THREADS = 8


class Arena:
    """Address space for rows, with huge pages where the system allows. Nothing is resident until it is touched.

    The memory goes back when the arena and the last view of its rows are gone, so a tier can be closed while somebody
    still looks at its bytes.

    Huge pages are transparent ones (`madvise`): they need no pool that an operator sets aside, never end in a SIGBUS
    when such a pool runs dry, and parts of an arena can be given back.

    Attributes:
        rows: uint8 [num_rows, layout.slot_bytes], page-aligned, zeroed.
    """

    def __init__(self, layout: BlockLayout, num_rows: int, *, is_sparse: bool = False) -> None:
        """Maps private memory.

        Args:
            layout: gives the row width.
            num_rows: at least 1.
            is_sparse: only a part will ever be touched: the system need not be able to give all of it.

        Raises:
            TierMemoryError: the address space cannot be had.
        """
        num_bytes = num_rows * layout.slot_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if is_sparse else 0)
        try:
            self._memory = mmap.mmap(-1, num_bytes, flags=flags)
        except (OSError, OverflowError, ValueError) as error:
            raise TierMemoryError(
                f"cannot map {num_bytes} bytes for {num_rows} blocks: {error}; ask for fewer blocks",
                needed_bytes=num_bytes,
                available_bytes=None,
            ) from error
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: 4 KiB pages work as well
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.rows: Rows = np.frombuffer(self._memory, dtype=np.uint8).reshape(num_rows, layout.slot_bytes)

    def give_back(self, start_row: int, stop_row: int) -> None:
        """Gives the memory of rows [start_row, stop_row) back to the system; they read as zeros from then on.

        Nobody may be using these rows, and CUDA must not hold them registered.
        """
        width = self.rows.shape[1]
        start = -(-start_row * width // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = stop_row * width // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


def map_rows(layout: BlockLayout, num_rows: int) -> Rows:
    """Rows of an `Arena` of their own.

    Args:
        layout: gives the row width.
        num_rows: at least 1.

    Returns:
        uint8 [num_rows, layout.slot_bytes].

    Raises:
        TierMemoryError: the address space cannot be had.
    """
    return Arena(layout, num_rows).rows


def prefault(rows: Rows, progress: Callable[[int, int], None] | None = None) -> None:
    """Touches every page of fresh, still zeroed rows, in several threads when they are many.

    Args:
        rows: uint8 [num_rows, row_bytes] of an arena; bytes are written (zeros), so nobody else may use them yet.
        progress: called with (bytes done, bytes in total) from worker threads, one call at a time.
    """
    flat = rows.reshape(-1)
    lock = Lock()
    done_bytes = 0

    def touch(start: int) -> None:
        nonlocal done_bytes
        step = flat[start : start + _PREFAULT_STEP_BYTES]
        step[:: mmap.PAGESIZE] = 0
        if progress is not None:
            with lock:
                done_bytes += step.size
                progress(done_bytes, flat.size)

    starts = range(0, flat.size, _PREFAULT_STEP_BYTES)
    num_threads = min(len(starts), os.cpu_count() or 1, _MAX_PREFAULT_THREADS)
    with ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="kv-prefault") as pool:
        for _ in pool.map(touch, starts):
            pass


@dataclass(frozen=True, slots=True)
class ResidentPages:
    """What the memory behind some rows is made of.

    Attributes:
        resident_bytes: memory that is really there.
        huge_bytes: the part of it in transparent huge pages.
        page_bytes: size of the pages that hold most of it.
    """

    resident_bytes: int
    huge_bytes: int
    page_bytes: int


def resident_pages(rows: Rows, proc: Path = Path("/proc")) -> ResidentPages | None:
    """Looks up the mappings that `rows` lie in; neighbouring memory that the kernel merged with them counts as well.

    Slow with much memory in small pages (the kernel walks them all): for start-up and reports, not for every request.

    Args:
        proc: where procfs is mounted.

    Returns:
        None where the system does not say.
    """
    first, last = rows.ctypes.data, rows.ctypes.data + rows.nbytes
    resident_kib = huge_kib = 0
    is_ours = False
    page_kib = mmap.PAGESIZE >> 10
    huge_page_kib = page_kib
    try:
        with (proc / "meminfo").open() as meminfo:
            huge_page_kib = next(
                (int(line.split()[1]) for line in meminfo if line.startswith("Hugepagesize:")), page_kib
            )
        with (proc / "self" / "smaps").open() as smaps:
            for line in smaps:
                name, *fields = line.split()
                if not name.endswith(":"):  # "7f0000000000-7f0000200000 rw-p …" begins a mapping
                    start, _, stop = name.partition("-")
                    is_ours = int(start, 16) < last and int(stop, 16) > first
                elif is_ours and name == "Rss:":
                    resident_kib += int(fields[0])
                elif is_ours and name == "AnonHugePages:":
                    huge_kib += int(fields[0])
    except (OSError, ValueError):
        return None
    is_mostly_huge = resident_kib > 0 and 2 * huge_kib >= resident_kib
    return ResidentPages(resident_kib << 10, huge_kib << 10, (huge_page_kib if is_mostly_huge else page_kib) << 10)
