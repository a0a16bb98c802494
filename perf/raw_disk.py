"""The disk's own speed: one file, direct I/O, calls of one size, a fixed number of them in flight. Nothing else."""

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np

from dynamo.perf.harness import BenchmarkError, timed

__all__ = ["RawFile"]


class RawFile:
    """A preallocated file of `size` bytes and as much memory, read and written whole. Owns both; deletes the file.

    Raises:
        BenchmarkError: the file system has no direct I/O.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._path = folder / "raw.dat"
        self._size = size
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise BenchmarkError(f"the file system of {folder} has no O_DIRECT; give --path another one") from error
            raise
        try:
            os.posix_fallocate(self._fd, 0, size)
            self._memory = mmap.mmap(-1, size)
            np.frombuffer(self._memory, dtype=np.uint8)[:] = 0xA5  # touches every page; zeros might be stored specially
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes and deletes the file."""
        os.close(self._fd)
        self._path.unlink()

    def write_s(self, call_bytes: int, depth: int) -> float:
        """Seconds to write everything in calls of `call_bytes`, a multiple of 4096, with `depth` of them in flight."""
        return timed(lambda: self._run(os.pwritev, call_bytes, depth)).wall_s

    def read_s(self, call_bytes: int, depth: int) -> float:
        """Seconds to read everything, as `write_s`."""
        return timed(lambda: self._run(os.preadv, call_bytes, depth)).wall_s

    def _run(self, call: Callable[[int, list[memoryview], int], int], call_bytes: int, depth: int) -> None:
        """Gives each of `depth` threads every depth-th piece: neighbours are in flight together, as a queue would do."""
        failures: list[OSError | BenchmarkError] = []
        view = memoryview(self._memory)

        def work(first: int) -> None:
            try:
                for start in range(first * call_bytes, self._size, depth * call_bytes):
                    piece = view[start : start + call_bytes]
                    moved = call(self._fd, [piece], start)
                    if moved != len(piece):
                        raise BenchmarkError(f"the disk moved {moved} bytes of {len(piece)}")
            except (OSError, BenchmarkError) as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(depth)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
