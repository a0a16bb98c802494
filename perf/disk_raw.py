"""The disk without any tier: threads of `preadv` and `pwritev` over shuffled places of files full of random bytes.

A thread has one call outstanding, so the queue depth is the number of threads; or one thread keeps as many asynchronous
requests under way. No place is visited twice in one run, and
buffered runs start with these files dropped from the page cache: it never answers instead of the disk.
"""

import contextlib
import errno
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.random import default_rng

from dynamo.perf.disk_calls import Call, Rate, open_queue, run_calls, run_requests
from dynamo.perf.harness import BenchmarkError

__all__ = ["EXTRA_FILES", "QUEUE_DEPTH", "RawDisk", "Way", "aligned_memory"]

EXTRA_FILES = 3
"""Files made in each folder beside the large one, each a quarter of it, to see whether more files are faster."""

QUEUE_DEPTH = 256
"""Of asynchronous requests, at most: as long as the queue that Linux gives a disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How the disk is used.

    Attributes:
        call_bytes: of one call, a multiple of 4096.
        depth: threads, each with one call outstanding; or requests.
        is_direct: O_DIRECT; otherwise through the page cache, written back before the clock stops.
        has_huge_pages: whether memory is in huge pages, where the system has them, or in pages of 4 KiB.
        num_files: in each folder: 1, or EXTRA_FILES of a quarter of its size each.
        is_ascending: places are still chosen at random, but visited in the order in which they lie, as a tier that sorts
            the blocks of a call would.
        is_queued: asynchronous requests of one thread instead of threads.
    """

    call_bytes: int
    depth: int
    is_direct: bool = True
    has_huge_pages: bool = True
    num_files: int = 1
    is_ascending: bool = False
    is_queued: bool = False


def aligned_memory(num_bytes: int, *, has_huge_pages: bool = True) -> mmap.mmap:
    """Resident memory that starts at a page, full of random bytes, in pages of one kind."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages has one kind only
        memory.madvise(mmap.MADV_HUGEPAGE if has_huge_pages else mmap.MADV_NOHUGEPAGE)
    random_bytes = default_rng(7).bytes(min(num_bytes, 16 << 20))
    for start in range(0, num_bytes, len(random_bytes)):
        memory[start : start + len(random_bytes)] = random_bytes[: num_bytes - start]
    stamps = np.frombuffer(memory, dtype=np.uint64).reshape(-1, mmap.PAGESIZE // 8)[:, 0]
    stamps[:] = default_rng(8).integers(0, 2**63, stamps.size, dtype=np.uint64)  # no page twice
    return memory


class RawDisk:
    """Files in some folders, filled with random bytes. Owns and deletes them.

    Several folders are used at the same time, as a tier striped over them would.
    """

    def __init__(self, folders: Sequence[Path], size: int, window: int, *, extra_files: int = EXTRA_FILES) -> None:
        """Makes files and memory; `fill` writes them.

        Args:
            folders: exist, on the disks to measure; emptied of these files in the end.
            size: bytes of the large files together.
            window: bytes of memory that calls take turns in.
            extra_files: in each folder; 0 where no way with several files is measured.

        Raises:
            BenchmarkError: a file system has no direct I/O.
        """
        self._window = window
        self._memory: dict[bool, mmap.mmap] = {}  # by whether in huge pages
        self._queue = open_queue(QUEUE_DEPTH)
        self._random = random.Random(1)
        self._paths: list[Path] = []
        self._fds: dict[tuple[Path, bool], int] = {}
        self._sizes: dict[Path, int] = {}
        share = size // len(folders) // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            for number in range(1 + extra_files):
                for folder in folders:
                    path = folder / f"raw-{number}.dat"
                    self._open(path)
                    self._paths.append(path)
                    self._sizes[path] = share if number == 0 else share // 4 // mmap.PAGESIZE * mmap.PAGESIZE
        except BaseException:
            self.close()
            raise
        self._num_folders = len(folders)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def can_queue(self) -> bool:
        """Whether ways with asynchronous requests can be run."""
        return self._queue is not None

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(self._sizes.values())

    def fill(self, advance: Callable[[int], object]) -> None:
        """Writes all files once; `advance` is told how many bytes more are done."""
        for path in self._paths:
            os.posix_fallocate(self._fds[path, True], 0, self._sizes[path])
            for start in range(0, self._sizes[path], self._window):
                part = memoryview(self._memory_in(has_huge_pages=True))[: min(self._window, self._sizes[path] - start)]
                for at in range(0, len(part), 8 << 20):
                    piece = part[at : at + (8 << 20)]
                    if os.pwritev(self._fds[path, True], [piece], start + at) != len(piece):
                        raise BenchmarkError(f"{path.parent} took only a part of a write; is it full?")
                    advance(len(piece))

    def run(self, way: Way, *, writes: bool, limit_s: float = 1e9, limit_bytes: int | None = None) -> Rate:
        """Reads or writes shuffled places, until all were visited or a limit is reached.

        Raises:
            OSError: the disk refuses.
            BenchmarkError: a call moved less than it should.
        """
        jobs = self._jobs(way)
        if limit_bytes is not None:
            jobs = jobs[: max(1, limit_bytes // way.call_bytes)]
        if way.is_ascending:
            jobs.sort(key=lambda job: (job[0], job[2]))
        if not way.is_direct:
            self._drop_cache()
        began = time.perf_counter()
        if way.is_queued:
            if self._queue is None:
                raise BenchmarkError("this system has no asynchronous I/O")
            rate = run_requests(self._queue, jobs, way.depth, writes=writes, limit_s=limit_s)
        else:
            rate = run_calls(jobs, way.depth, writes=writes, limit_s=limit_s)
        if writes and not way.is_direct:
            for path in self._in_use(way):
                os.fdatasync(self._fds[path, False])
            return Rate(rate.num_bytes, time.perf_counter() - began)
        return rate

    def close(self) -> None:
        """Closes and deletes the files. Idempotent."""
        if self._queue is not None:
            self._queue.close()
        while self._fds:
            os.close(self._fds.popitem()[1])
        while self._paths:
            self._paths.pop().unlink(missing_ok=True)

    def _open(self, path: Path) -> None:
        for is_direct, flag in ((True, os.O_DIRECT), (False, 0)):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flag, 0o600)
            except OSError as error:
                path.unlink(missing_ok=True)  # the kernel makes the file before it refuses the flag
                if error.errno == errno.EINVAL:
                    raise BenchmarkError(
                        f"the file system of {path.parent.parent} has no O_DIRECT: what it gives is the page cache's speed; "
                        "give --path another one"
                    ) from error
                raise
            self._fds[path, is_direct] = fd

    def _in_use(self, way: Way) -> list[Path]:
        return self._paths[: self._num_folders] if way.num_files == 1 else self._paths[self._num_folders :]

    def _memory_in(self, *, has_huge_pages: bool) -> mmap.mmap:
        if has_huge_pages not in self._memory:
            self._memory[has_huge_pages] = aligned_memory(self._window, has_huge_pages=has_huge_pages)
        return self._memory[has_huge_pages]

    def _jobs(self, way: Way) -> list[Call]:
        view = memoryview(self._memory_in(has_huge_pages=way.has_huge_pages))
        places = [
            (self._fds[path, way.is_direct], offset)
            for path in self._in_use(way)
            for offset in range(0, self._sizes[path] - way.call_bytes + 1, way.call_bytes)
        ]
        if not places:
            raise BenchmarkError(f"files of this --size hold no call of {way.call_bytes} bytes; give more")
        self._random.shuffle(places)
        memory = self._memory_places(way.call_bytes)
        return [
            (fd, [view[at : at + way.call_bytes]], offset) for (fd, offset), at in zip(places, memory, strict=False)
        ]

    def _memory_places(self, call_bytes: int) -> Iterator[int]:
        while True:
            yield from range(0, self._window - call_bytes + 1, call_bytes)

    def _drop_cache(self) -> None:
        for path in self._paths:
            fd = self._fds[path, False]
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
