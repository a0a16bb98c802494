"""A kvikio for tests and crash runs on machines without a GPU: real files, and host memory in the place of the GPU's."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

__all__ = ["FakeKvikio", "Spoil"]

_NUM_THREADS = 4
_TIMEOUT_S = 30.0

Spoil = Callable[[str, torch.Tensor], int | None]
"""Given "read" after, or "write" before the bytes move, and the memory: changes or refuses what a call does.

It may return another number of bytes than were moved, or raise.
"""


class FakeKvikio:
    """Reads and writes tensors in host memory like kvikio, on threads."""

    def __init__(self, spoil: Spoil = lambda what, memory: None, *, compat: bool = False) -> None:
        """`spoil` may be replaced at any time; `compat` is what `is_compat_mode` tells."""
        self.spoil = spoil
        self.num_open = 0
        self._compat = compat
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="fake-kvikio")

    def open(self, path: Path) -> "_FakeFile":
        """See `Kvikio.open`."""
        self.num_open += 1
        return _FakeFile(path, self._pool, lambda what, memory: self.spoil(what, memory))

    def is_compat_mode(self) -> bool:
        """See `Kvikio.is_compat_mode`."""
        return self._compat


class _FakeFile:
    def __init__(self, path: Path, pool: ThreadPoolExecutor, spoil: Spoil) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._pool = pool
        self._spoil = spoil

    def pread(self, buf: object, size: int | None = None, file_offset: int = 0) -> "_Pending":
        return _Pending(self._pool.submit(self._read, buf, size, file_offset))

    def pwrite(self, buf: object, size: int | None = None, file_offset: int = 0) -> "_Pending":
        return _Pending(self._pool.submit(self._write, buf, size, file_offset))

    def close(self) -> None:
        os.close(self._fd)

    def _read(self, buf: object, size: int | None, offset: int) -> int:
        assert isinstance(buf, torch.Tensor)
        count = os.preadv(self._fd, [buf.view(-1).numpy()[:size].data], offset)
        told = self._spoil("read", buf)
        return count if told is None else told

    def _write(self, buf: object, size: int | None, offset: int) -> int:
        assert isinstance(buf, torch.Tensor)
        told = self._spoil("write", buf)
        count = os.pwritev(self._fd, [buf.view(-1).numpy()[:size].data], offset)
        return count if told is None else told


class _Pending:
    def __init__(self, future: Future[int]) -> None:
        self._future = future

    def get(self) -> int:
        return self._future.result(_TIMEOUT_S)
