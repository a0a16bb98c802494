"""How much may be written to a disk in a day, so that a cache does not wear a drive out before its time."""

import contextlib
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import xxhash

from dynamo.tiers.errors import TierConfigError
from dynamo.tiers.plain_file import open_plain

__all__ = ["WriteBudget", "WriteBudgetStats", "least_bytes_per_day"]

_DAY_S = 86_400.0
_BURSTS_PER_DAY = 24  # an hour's share may be written at once
_SAVE_SHARE = 1 / 16  # of a burst; so much is forgotten at most when the process is killed
_MAGIC = b"DYNKVWB1"
_BODY = struct.Struct("<8sddQ")  # magic, available bytes, wall-clock time, bytes written ever; the check follows


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBudgetStats:
    """A tier's budget of writes at one moment.

    Attributes:
        bytes_per_day: what may be written in a day.
        burst_bytes: what may be written at once after a pause.
        available_bytes: what may be written now.
        written_bytes: what was written since the tier was opened, whole slots.
        refused_blocks: blocks that were not written because nothing was left, since the tier was opened.
    """

    bytes_per_day: int
    burst_bytes: int
    available_bytes: int
    written_bytes: int
    refused_blocks: int


class WriteBudget:
    """A token bucket of bytes: fills at `bytes_per_day`, holds an hour's share. Thread-safe.

    Refills by the monotonic clock, so setting the machine's clock changes nothing. What is left is remembered in a small
    file, so that restarts do not refill the bucket; the time between two runs is taken from the wall clock, which counts as
    none when it went backwards and never fills more than the bucket.
    """

    def __init__(
        self,
        bytes_per_day: int,
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Goes on where the file at `path` left off; starts with a full bucket without one, or if it is not readable.

        Raises:
            TierConfigError: `bytes_per_day` is not positive.
        """
        if bytes_per_day <= 0:
            raise TierConfigError(f"a write budget of {bytes_per_day} bytes a day lets nothing be written; give more")
        self.bytes_per_day = bytes_per_day
        self.burst_bytes = bytes_per_day / _BURSTS_PER_DAY
        self._path = path
        self._clock, self._wall_clock = clock, wall_clock
        self._lock = Lock()
        self._available_bytes = self.burst_bytes
        self._written_bytes = 0
        self._unsaved_bytes = 0
        self._filled_at_s = clock()
        if path is not None:
            self._load(path)

    @property
    def written_bytes(self) -> int:
        """All that was taken and not given back since the file was made, over restarts."""
        return self._written_bytes

    @property
    def available_bytes(self) -> int:
        """Bytes that may be written now."""
        with self._lock:
            self._fill()
            return int(self._available_bytes)

    def take(self, num_units: int, unit_bytes: int) -> int:
        """Takes as many of `num_units` units as the bucket holds; returns how many."""
        with self._lock:
            self._fill()
            granted = max(0, min(num_units, int(self._available_bytes // unit_bytes)))
            self._book(granted * unit_bytes)
        return granted

    def give_back(self, num_bytes: int) -> None:
        """Returns bytes that were taken and not written."""
        with self._lock:
            self._book(-num_bytes)

    def close(self) -> None:
        """Remembers what is left. Idempotent."""
        with self._lock:
            self._save()

    def _book(self, num_bytes: int) -> None:
        self._available_bytes -= num_bytes
        self._written_bytes += num_bytes
        self._unsaved_bytes += num_bytes
        if self._unsaved_bytes >= self.burst_bytes * _SAVE_SHARE:
            self._save()

    def _fill(self) -> None:
        now_s = self._clock()
        gained_bytes = (now_s - self._filled_at_s) * self.bytes_per_day / _DAY_S
        self._filled_at_s = now_s
        self._available_bytes = min(self.burst_bytes, self._available_bytes + gained_bytes)

    def _load(self, path: Path) -> None:
        try:
            fd = open_plain(path, os.O_RDONLY)
            try:
                data = os.pread(fd, 2 * _BODY.size, 0)
            finally:
                os.close(fd)
        except OSError:
            return
        if len(data) != _BODY.size + 8 or data[_BODY.size :] != _check(data[: _BODY.size]):
            return
        magic, available_bytes, saved_at_s, written_bytes = _BODY.unpack(data[: _BODY.size])
        if magic != _MAGIC:
            return
        gained_bytes = max(0.0, self._wall_clock() - saved_at_s) * self.bytes_per_day / _DAY_S
        self._available_bytes = min(self.burst_bytes, available_bytes + gained_bytes)
        self._written_bytes = written_bytes

    def _save(self) -> None:
        if self._path is None:
            return
        self._unsaved_bytes = 0
        body = _BODY.pack(_MAGIC, self._available_bytes, self._wall_clock(), max(0, self._written_bytes))
        with contextlib.suppress(OSError):  # a disk that cannot keep this keeps no blocks either
            fd = open_plain(self._path, os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(fd, body + _check(body), 0)
            finally:
                os.close(fd)


def least_bytes_per_day(unit_bytes: int) -> int:
    """The smallest budget under which one unit may ever be written: what is written at once is only a share of it."""
    return unit_bytes * _BURSTS_PER_DAY


def _check(body: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")
