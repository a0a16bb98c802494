"""A log of which blocks requests used, for replaying the traffic of a live server against other cache sizes and policies.

    engine's thread: record ──► bounded queue ──► event loop: render, write, rotate

One JSON line per request that has ended after it held blocks, whatever ended it:

    {"time_s": 1767225600.25,           wall clock when the request ended, seconds since 1970
     "num_prompt_tokens": 812, "num_output_tokens": 64,
     "cached_tokens": 800,              of the prompt, when the request was first admitted
     "block_size": 16,
     "keys": "9ae16a3b2f90404f..."}     of its full blocks, first to last: 8 bytes each (`lo`), as 16 hexadecimal digits

Keys are hashes of tokens; no text is written. Whoever has a prompt can still find out whether it was seen, so the file is its
owner's alone (mode 0600). The engine never waits for it: what does not fit into the queue, or cannot be written, is dropped
and counted. At its largest size the file becomes FILE.1, and the one of that name before it is gone.
"""

import asyncio
import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiofiles
import aiofiles.os
import msgspec
from aiofiles.threadpool.binary import AsyncFileIO
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo.serve.engine.request import FinishedRequest
from dynamo.serve.errors import ConfigError
from dynamo.serve.key_log_line import KeyLogLine, key_digits
from dynamo.serve.path_refusal import path_refusal

__all__ = ["KeyLog", "check_key_log"]

logger = logging.getLogger(__name__)

_MAX_BYTES = 256 << 20
_MAX_QUEUED_REQUESTS = 4096
_MAX_QUEUED_BLOCKS = 1 << 20  # some 50 MB of keys
_REQUESTS_PER_WRITE = 64
_CLOSE_TIMEOUT_S = 10.0
_FIRST_BYTES = b'{"time_s":'


@dataclass(frozen=True, slots=True)
class _Entry:
    """A request that waits to be written."""

    time_s: float
    request: FinishedRequest


class KeyLog(Collector):
    """Writes the file while its `async with` block runs. `record` may be called from any thread; also the log's metrics."""

    def __init__(self, path: Path, *, block_size: int, max_bytes: int = _MAX_BYTES) -> None:
        """Args:
        path: the file; appended to where it exists.
        max_bytes: size at which it is put aside; the two files together take at most twice that.
        """
        self._path = path
        self._block_size = block_size
        self._max_bytes = max_bytes
        self._file: AsyncFileIO | None = None
        self._size = 0
        self._failure_logged = False
        self._num_written = 0
        self._num_bytes = 0
        self._dropped: Counter[str] = Counter({"queue_full": 0, "write_failed": 0})
        self._lock = threading.Lock()  # guards the queue, its size in blocks, and the count of what found no place
        self._queue: deque[_Entry] = deque()
        self._num_queued_blocks = 0
        self._is_closing = False

    async def __aenter__(self) -> Self:
        """Opens the file.

        Raises:
            ConfigError: it cannot be opened, is no plain file, or is written by another process.
        """
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        try:
            await self._open()
        except OSError as error:
            raise _unusable(self._path, error) from error
        self._writer = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes what is queued, for at most ten seconds, and closes the file."""
        self._is_closing = True
        self._wake.set()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._writer
        except TimeoutError:
            logger.error("--key-log %s: still writing after %g s; going on without it", self._path, _CLOSE_TIMEOUT_S)
        finally:
            await self._close()

    def record(self, request: FinishedRequest) -> None:
        """Queues a request, or drops and counts it. Never waits, never raises."""
        entry = _Entry(time.time(), request)
        num_blocks = len(request.block_keys)
        with self._lock:
            if (
                self._is_closing
                or len(self._queue) >= _MAX_QUEUED_REQUESTS
                or self._num_queued_blocks + num_blocks > _MAX_QUEUED_BLOCKS
            ):
                self._dropped["queue_full"] += 1
                return
            is_first = not self._queue
            self._queue.append(entry)
            self._num_queued_blocks += num_blocks
        if is_first:
            with suppress(RuntimeError):  # the event loop was closed
                self._loop.call_soon_threadsafe(self._wake.set)

    def collect(self) -> Iterator[Metric]:
        """The log's own counters."""
        yield CounterMetricFamily("dynamo_key_log_requests", "Requests written to the key log.", self._num_written)
        yield CounterMetricFamily("dynamo_key_log_bytes", "Bytes written to the key log.", self._num_bytes)
        dropped = CounterMetricFamily(
            "dynamo_key_log_dropped_requests", "Requests missing from the key log.", labels=["reason"]
        )
        for reason, count in sorted(self._dropped.items()):
            dropped.add_metric([reason], count)
        yield dropped

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while entries := self._take():
                await self._write(entries)
            if self._is_closing:
                return

    def _take(self) -> list[_Entry]:
        with self._lock:
            entries = [self._queue.popleft() for _ in range(min(len(self._queue), _REQUESTS_PER_WRITE))]
            self._num_queued_blocks -= sum(len(entry.request.block_keys) for entry in entries)
        return entries

    async def _write(self, entries: Sequence[_Entry]) -> None:
        lines = await asyncio.to_thread(_render, entries, self._block_size)
        try:
            if self._file is None:
                await self._open()
            if self._size and self._size + len(lines) > self._max_bytes:
                await self._rotate()
            await self._append(lines)
        except OSError as error:
            self._dropped["write_failed"] += len(entries)
            if not self._failure_logged:
                self._failure_logged = True
                logger.warning(
                    "--key-log %s cannot be written (%s): requests are missing from it; further failures are only counted",
                    self._path,
                    error.strerror or error,
                )
        else:
            self._num_written += len(entries)
            self._num_bytes += len(lines)

    async def _append(self, lines: bytes) -> None:
        """Writes all of `lines` or, with an error, none."""
        file = self._file
        assert file is not None, "opened before"
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[await file.write(rest) :]
        except OSError:
            with suppress(OSError):
                await file.truncate(self._size)
            raise
        self._size += len(lines)

    async def _rotate(self) -> None:
        await self._close()
        with suppress(FileNotFoundError):  # somebody took it away
            await aiofiles.os.replace(self._path, f"{self._path}.1")
        await self._open()

    async def _open(self) -> None:
        file = await aiofiles.open(self._path, "ab", buffering=0, opener=_open_private)
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    async def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                await file.close()


def check_key_log(path: Path) -> None:
    """Makes sure that the file can be written, before a model is loaded for nothing.

    Raises:
        ConfigError: see `KeyLog.__aenter__`.
    """
    try:
        os.close(_open_private(str(path), os.O_APPEND | os.O_CREAT))
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--key-log {path}: {path_refusal(path, error, 'write')}")


def _open_private(path: str, flags: int) -> int:
    """Opens a plain file for its owner's eyes only, ended by a whole line, and keeps other writers off it."""
    flags = (flags & ~os.O_ACCMODE) | os.O_RDWR  # its last byte is read
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "this is no plain file")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another process writes it, and each needs a file of its own") from None
        # The first line may have been cut short, too.
        if not _FIRST_BYTES.startswith(os.pread(fd, len(_FIRST_BYTES), 0).partition(b"\n")[0]):
            raise OSError(errno.EINVAL, "this file has other content than a key log")
        os.fchmod(fd, 0o600)
        if status.st_size and os.pread(fd, 1, status.st_size - 1) != b"\n":  # whoever wrote it last was interrupted
            os.write(fd, b"\n")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _render(entries: Sequence[_Entry], block_size: int) -> bytes:
    encoder = msgspec.json.Encoder()
    lines = bytearray()
    for entry in entries:
        request = entry.request
        line = KeyLogLine(
            time_s=entry.time_s,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=request.num_output_tokens,
            cached_tokens=request.num_cached_tokens,
            block_size=block_size,
            keys=key_digits(request.block_keys),
        )
        lines += encoder.encode(line) + b"\n"
    return bytes(lines)
