"""Registrations as files: how they are written, read again with due distrust, and what has changed since the last look."""

import errno
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from dynamo.serve.process_identity import is_running, machine_id, start_ticks
from dynamo.serve.registration import Joined, Left, Registration

__all__ = ["FILE_SUFFIX", "MAX_WORKERS", "Entry", "FolderView", "make_private", "read_entry", "write_entry"]

logger = logging.getLogger(__name__)

FILE_SUFFIX: Final = ".json"

MAX_WORKERS: Final = 4096
"""Most that are seen in one folder; further ones, by name, are passed over."""

_MAX_FILE_BYTES: Final = 64 << 10


class Entry(msgspec.Struct, frozen=True):
    """A worker's file. `machine` and `started` say whether `registration.pid` can be looked at, and is still the same."""

    registration: Registration
    machine: str
    started: int | None


_decoder = msgspec.json.Decoder(Entry)
# What msgspec raises on bytes that it cannot read; the last ones for text that is no UTF-8, and for nesting without end.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def make_private(folder: Path) -> None:
    """Makes a folder for this user only, where it is missing.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def read_entry(path: Path) -> Entry | None:
    """A worker's entry; None where the file is not there, not whole, not this user's, or something else altogether.

    Raises:
        OSError: this process, or the machine, cannot read any file now; nothing is known of the entry.
    """
    try:
        with _opened(path) as fd:
            found = os.fstat(fd)
            is_trusted = found.st_uid in (os.geteuid(), 0) and not found.st_mode & 0o022
            if not stat.S_ISREG(found.st_mode) or not is_trusted or found.st_size > _MAX_FILE_BYTES:
                return None
            return _decoder.decode(os.read(fd, _MAX_FILE_BYTES))
    except OSError as error:
        if error.errno in _BLIND:
            raise
        return None
    except _UNREADABLE:
        return None


# Too many open files, most of them clients', or no memory; disks and network folders that do not answer.
_BLIND: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    # Neither a link elsewhere is followed, nor does a pipe that somebody put there make this wait.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def write_entry(path: Path, registration: Registration) -> None:
    """Puts a worker's entry in place of what is there, as a whole.

    Raises:
        OSError: it cannot be written.
    """
    content = msgspec.json.encode(Entry(registration, machine_id(), start_ticks(registration.pid)))
    # The name does not end like an entry's, and a leftover of a killed process with our pid is in nobody's way.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        unfinished.unlink()
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(content)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


@dataclass(slots=True)
class _Known:
    entry: Entry
    mtime_ns: int
    changed_s: float  # on the watcher's clock
    has_joined: bool


class _Found(NamedTuple):
    entry: Entry
    mtime_ns: int
    age_s: float  # by the clocks of two machines, which may differ


class FolderView:
    """What one watcher has seen in a folder so far.

    Args:
        silence_s: a worker whose file does not change for so long is gone.
        poll_s: how often the folder is looked at.
        known: workers that are taken to be there until the first look.
    """

    def __init__(self, folder: Path, *, silence_s: float, poll_s: float, known: Iterable[Registration] = ()) -> None:
        self._folder = folder
        self._silence_s = silence_s
        self._poll_s = poll_s
        self._machine = machine_id()
        self._is_readable = True
        self._before = {registration.worker_id: registration for registration in known}
        self._known: dict[str, _Known] = {}
        self._looked_s: float | None = None

    @property
    def local_pids(self) -> set[int]:
        """Processes of this machine that have a worker."""
        entries = (known.entry for known in self._known.values())
        return {entry.registration.pid for entry in entries if entry.machine == self._machine}

    def read(self) -> dict[str, _Found] | None:
        """Entries by worker; None if nothing can be seen. May run on another thread, one call at a time."""
        try:
            found = self._read()
        except OSError as error:
            if self._is_readable:
                logger.error(
                    "the discovery folder %s cannot be read: %s; until it can, workers are taken to be there as before",
                    self._folder,
                    error,
                )
            self._is_readable = False
            return None
        if not self._is_readable:
            logger.info("the discovery folder %s can be read again", self._folder)
        self._is_readable = True
        return found

    def _read(self) -> dict[str, _Found]:
        found: dict[str, _Found] = {}
        names = sorted(name for name in os.listdir(self._folder) if name.endswith(FILE_SUFFIX))
        for name in names[:MAX_WORKERS]:
            path = self._folder / name
            entry = read_entry(path)
            if entry is None or name != f"{entry.registration.worker_id}{FILE_SUFFIX}" or self._has_ended(entry):
                continue
            with suppress(FileNotFoundError):
                changed = path.lstat()
                found[entry.registration.worker_id] = _Found(entry, changed.st_mtime_ns, time.time() - changed.st_mtime)
        return found

    def update(self, found: dict[str, _Found] | None, now_s: float) -> Iterator[Joined | Left]:
        """What has changed with what was read now.

        A watcher that sees nothing (None) says nothing: whose process ended is known from the sessions with it.
        """
        stood_still = self._looked_s is not None and now_s - self._looked_s > 2 * self._poll_s
        if self._looked_s is not None and (stood_still or found is None):
            # This process could not see that others went on.
            for known in self._known.values():
                known.changed_s += now_s - self._looked_s
        self._looked_s = now_s
        if found is None:
            return
        before, self._before = self._before, {}
        for worker_id, registration in before.items():
            if worker_id not in found or found[worker_id].entry.registration != registration:
                yield Left(worker_id, "its registration is gone or another one")
            else:
                entry, mtime_ns, _ = found[worker_id]
                self._known[worker_id] = _Known(entry, mtime_ns, now_s, has_joined=True)
        for worker_id in [*self._known]:
            if worker_id not in found:
                yield from self._drop(worker_id, "its registration is gone, or its process has ended")
            elif found[worker_id].entry != self._known[worker_id].entry:
                yield from self._drop(worker_id, "it says something else of itself now")
        for worker_id, (entry, mtime_ns, age_s) in found.items():
            if worker_id not in self._known:
                # What was not touched lately may be a leftover: its next beat will tell.
                self._known[worker_id] = _Known(entry, mtime_ns, now_s, age_s < self._silence_s)
                if age_s < self._silence_s:
                    yield Joined(entry.registration)
                continue
            known = self._known[worker_id]
            if known.mtime_ns != mtime_ns:
                known.mtime_ns, known.changed_s = mtime_ns, now_s
                if not known.has_joined:
                    known.has_joined = True
                    yield Joined(entry.registration)
            elif known.has_joined and now_s - known.changed_s > self._silence_s:
                known.has_joined = False
                yield Left(worker_id, f"its registration was not kept up for {now_s - known.changed_s:.1f} s")

    def _drop(self, worker_id: str, reason: str) -> Iterator[Left]:
        if self._known.pop(worker_id).has_joined:
            yield Left(worker_id, reason)

    def _has_ended(self, entry: Entry) -> bool:
        if entry.machine != self._machine:
            return False
        return not is_running(entry.registration.pid, entry.started)
