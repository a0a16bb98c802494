"""Anonymous memory that tiers are made of: one mmap seen as numpy rows, and how much of it the system can give."""

import contextlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np

from dynamo.kernels.checks import Rows
from dynamo.tiers.errors import TierMemoryError
from dynamo.tiers.layout import BlockLayout

__all__ = ["available_memory_bytes", "map_rows", "prefault"]

_PREFAULT_STEP_BYTES = 64 << 20
_MAX_PREFAULT_THREADS = 8


def map_rows(layout: BlockLayout, num_slots: int) -> Rows:
    """Maps zeroed, private, page-aligned memory, with huge pages where the system allows.

    The array owns the mapping: the memory goes back when the last view of it is gone, so a tier can be closed while
    somebody still looks at its bytes. Nothing is resident until it is touched.

    Args:
        layout: gives the row width.
        num_slots: rows, at least 1.

    Returns:
        uint8 [num_slots, layout.slot_bytes].

    Raises:
        TierMemoryError: the address space cannot be had.
    """
    num_bytes = num_slots * layout.slot_bytes
    try:
        arena = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise TierMemoryError(
            f"cannot map {num_bytes} bytes for {num_slots} blocks: {error}; ask for fewer blocks",
            needed_bytes=num_bytes,
            available_bytes=None,
        ) from error
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages: 4 KiB pages work as well
        arena.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(arena, dtype=np.uint8).reshape(num_slots, layout.slot_bytes)


def prefault(rows: Rows, progress: Callable[[int, int], None] | None = None) -> None:
    """Touches every page of a fresh, still zeroed arena, in several threads when it is large.

    Args:
        rows: uint8 [num_rows, row_bytes] from `map_rows`; bytes are written (zeros), so nobody else may use it yet.
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
    with ThreadPoolExecutor(num_threads, thread_name_prefix="kv-prefault") as pool:
        for _ in pool.map(touch, starts):
            pass


def available_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that can still be had without swapping: the smaller of the machine's and this process's cgroup's rest.

    Args:
        proc: where procfs is mounted.
        cgroups: where cgroup v2 is mounted; limits of version 1 are not seen.

    Returns:
        Bytes, or None where the system does not say.
    """
    rests = [rest for rest in (_machine_rest_bytes(proc), _cgroup_rest_bytes(proc, cgroups)) if rest is not None]
    return min(rests, default=None)


def _machine_rest_bytes(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_rest_bytes(proc: Path, cgroups: Path) -> int | None:
    """Rest under the tightest limit on the way from this process's group to the root; page cache counts as free."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return None
    group = cgroups / own.lstrip("/")
    groups = [group, *(parent for parent in group.parents if parent == cgroups or cgroups in parent.parents)]
    rests = [rest for rest in map(_group_rest_bytes, groups) if rest is not None]
    return min(rests, default=None)


def _group_rest_bytes(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    except (OSError, KeyError, ValueError):
        return None  # the machine's root group has no such files, and a container may hide its parents'
