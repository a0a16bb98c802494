"""Host memory shared out among processes: each reserves before it pins, and what does not fit is refused with names.

```
/dev/shm/dynamo-kv-<uid>/lock                  held for the moment of counting and reserving
/dev/shm/dynamo-kv-<uid>/<random>.reservation  one for each arena, locked by its owner for as long as it lives
```

A reservation counts while its file is locked. The kernel lets go of the lock when the last process that holds the
arena's memory is gone, however it ended, so nothing stale is ever left behind. Each user has a budget of their own.

Who cannot count gets nothing: while the lock stays taken, by a process that was stopped with it, while shared memory is full
or a live reservation cannot be read, nothing is reserved or grown. Only where there is no place for reservations at all do
processes go on without a budget, which the log says.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo.tiers.errors import TierConfigError, TierMemoryError
from dynamo.tiers.memory import memory_limit_bytes

__all__ = ["DEFAULT_SHARE", "Holder", "HostBudget", "Reservation"]

logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.8
"""Part of the memory limit that all arenas together may take; the rest is for weights being loaded, code and page cache."""

_SHARED_MEMORY = Path("/dev/shm")
_SUFFIX = ".reservation"
_LOCK_TIMEOUT_S = 10.0
_LOCK_POLL_S = 0.005
_PID_DIGITS = 20
_RECORD_BYTES = 4096  # all alike, so that one write replaces what was there; shared memory gives whole pages anyway
# There is a place for reservations, but not now: of space there and of this process's descriptors.
_SHORTAGES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Holder:
    """A live reservation.

    Attributes:
        pid: as its owner sees itself; another container counts its processes anew.
        purpose: what the memory is for.
    """

    pid: int
    num_bytes: int
    purpose: str


class Reservation:
    """Bytes that are taken from the budget until `close`, or until this process is gone. Made by `HostBudget.reserve`."""

    def __init__(self, budget: "HostBudget", path: Path | None, fd: int | None, purpose: str, num_bytes: int) -> None:
        """Takes over `fd`, which is locked; without one the reservation holds nothing."""
        self.num_bytes = num_bytes
        self._budget = budget
        self._path = path
        self._fd = fd
        self._purpose = purpose

    def resize(self, num_bytes: int) -> None:
        """Makes it larger or smaller.

        Raises:
            TierMemoryError: there is not so much left, or nobody can tell now; the reservation stays as it was.
        """
        if self._fd is not None and self._path is not None:
            try:
                with self._budget.locked():
                    if num_bytes > self.num_bytes:
                        self._budget.check(num_bytes, self._purpose, own=self._path)
                    self._fd = _rewrite(self._fd, self._path, num_bytes, self._purpose)
            except OSError as error:
                if num_bytes > self.num_bytes:
                    raise TierMemoryError(
                        f"{self._purpose} cannot grow from {_gib(self.num_bytes)} to {_gib(num_bytes)}: how much KV caches "
                        f"take on this machine cannot be counted now ({error}); try again when that has changed",
                        needed_bytes=num_bytes,
                        available_bytes=None,
                    ) from error
                logger.warning(
                    "other processes do not see yet that %s takes only %s now: %s",
                    self._purpose,
                    _gib(num_bytes),
                    error,
                )
        self.num_bytes = num_bytes

    def close(self) -> None:
        """Gives the bytes back. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None and self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(fd)


class HostBudget:
    """What all arenas of one user's processes on this machine may take together."""

    def __init__(
        self, folder: Path | None = None, limit_bytes: int | None = None, *, lock_timeout_s: float = _LOCK_TIMEOUT_S
    ) -> None:
        """Describes the budget; nothing is opened yet.

        Args:
            folder: where reservations are kept, in memory as a rule; the same for all processes.
            limit_bytes: the most that all of them may take; by default 80 % of the machine's memory or of this process's
                cgroup limit, whichever is smaller.
            lock_timeout_s: how long to wait for another process that counts, which takes it less than a millisecond.

        Raises:
            TierConfigError: the limit is not positive.
        """
        if limit_bytes is not None and limit_bytes <= 0:
            raise TierConfigError(f"a host memory budget of {limit_bytes} bytes holds nothing; give it more")
        self.folder = folder or _SHARED_MEMORY / f"dynamo-kv-{os.getuid()}"
        self._limit_bytes = limit_bytes
        self._lock_timeout_s = lock_timeout_s

    @property
    def limit_bytes(self) -> int | None:
        """The most that may be reserved; None where the system does not say how much memory it has."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        total_bytes = memory_limit_bytes()
        return None if total_bytes is None else int(DEFAULT_SHARE * total_bytes)

    def reserve(self, num_bytes: int, purpose: str) -> Reservation:
        """Takes bytes from the budget, before any memory is touched.

        Where reservations cannot be kept (no shared memory, or it belongs to somebody else), that is logged, and the
        caller goes on unbudgeted.

        Raises:
            TierMemoryError: it does not fit, and the message says who holds what; or that cannot be told or written down now,
                since a process keeps the others from counting, or space or descriptors have run out.
        """
        try:
            with contextlib.ExitStack() as counting:
                try:
                    counting.enter_context(self.locked())
                except OSError as error:
                    if isinstance(error, TimeoutError) or error.errno in _SHORTAGES:
                        raise
                    logger.warning(
                        "host memory is not shared out with other processes: %s; make %s a folder of this user's own",
                        error,
                        self.folder,
                    )
                    return Reservation(self, None, None, purpose, num_bytes)
                self.check(num_bytes, purpose)
                path = self.folder / f"{secrets.token_hex(8)}{_SUFFIX}"
                return Reservation(self, path, _make(path, num_bytes, purpose), purpose, num_bytes)
        except OSError as error:
            raise TierMemoryError(
                f"{purpose} needs {_gib(num_bytes)}, and how much KV caches take on this machine cannot be counted now: "
                f"{error}",
                needed_bytes=num_bytes,
                available_bytes=None,
            ) from error

    def holders(self) -> Sequence[Holder]:
        """All live reservations, the largest first. Empty where none was ever made.

        Raises:
            OSError: the folder cannot be used.
        """
        if not self.folder.exists():
            return ()
        with self.locked():
            return [holder for _, holder in self._live()]

    def check(self, num_bytes: int, purpose: str, own: Path | None = None) -> None:
        """Whether `num_bytes` fit beside all reservations but `own`; the caller has `locked`.

        Raises:
            TierMemoryError: they do not.
            OSError: somebody's reservation cannot be read.
        """
        others = [holder for path, holder in self._live() if path != own]
        limit_bytes = self.limit_bytes
        if limit_bytes is None:
            return
        left_bytes = limit_bytes - sum(holder.num_bytes for holder in others)
        if num_bytes <= left_bytes:
            return
        held = "; ".join(f"process {h.pid} holds {_gib(h.num_bytes)} for {h.purpose}" for h in others)
        raise TierMemoryError(
            f"{purpose} needs {_gib(num_bytes)}, but of the {_gib(limit_bytes)} that KV caches may take on this machine "
            f"{_gib(max(0, left_bytes))} are left ({held or 'no other process holds any'}); "
            f"make it smaller{', or end or shrink one of those' if others else ''}",
            needed_bytes=num_bytes,
            available_bytes=max(0, left_bytes),
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes and threads from counting or reserving.

        Raises:
            TimeoutError: another process holds the lock for longer than `lock_timeout_s`.
            OSError: the folder cannot be used.
        """
        self._make_folder()
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            deadline = time.monotonic() + self._lock_timeout_s
            while not _try_lock(fd):
                if time.monotonic() >= deadline:
                    holder = os.pread(fd, _PID_DIGITS, 0).decode(errors="replace").strip() or "unknown"
                    raise TimeoutError(
                        f"process {holder} has held {self.folder / 'lock'} for longer than {self._lock_timeout_s:g} s; "
                        "continue or end that process"
                    )
                time.sleep(_LOCK_POLL_S)
            with contextlib.suppress(OSError):  # without space the lock holds all the same, only nameless
                os.pwrite(fd, str(os.getpid()).encode().ljust(_PID_DIGITS), 0)
            yield
        finally:
            os.close(fd)

    def _make_folder(self) -> None:
        """Makes the folder, or sees to it that nobody else could have put anything into it."""
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        status = self.folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise PermissionError(f"{self.folder} is not a folder that only this user can write to")

    def _live(self) -> list[tuple[Path, Holder]]:
        """Reservations whose owners live, the largest first; files of others are removed. The caller has `locked`."""
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue  # closed by its owner just now, which takes no lock
            try:
                if _try_lock(fd):
                    path.unlink(missing_ok=True)
                else:
                    found.append((path, _read(fd, path)))
            finally:
                os.close(fd)
        return sorted(found, key=lambda entry: -entry[1].num_bytes)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make(path: Path, num_bytes: int, purpose: str) -> int:
    """A new, locked file that says what is reserved; none is left when that fails, as others could not count it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write(fd, path, num_bytes, purpose)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(fd)
        raise
    return fd


def _rewrite(fd: int, path: Path, num_bytes: int, purpose: str) -> int:
    """`fd`, or a new descriptor in its place when its file was deleted, as a session's end may clean up shared memory."""
    if os.fstat(fd).st_nlink:
        _write(fd, path, num_bytes, purpose)
        return fd
    made = _make(path, num_bytes, purpose)
    os.close(fd)
    return made


def _write(fd: int, path: Path, num_bytes: int, purpose: str) -> None:
    """Replaces the whole record or, on an error, which names the file, nothing of it."""
    text = json.dumps({"pid": os.getpid(), "bytes": num_bytes, "purpose": purpose}).encode().ljust(_RECORD_BYTES)
    try:
        num_written = os.pwrite(fd, text, 0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    if num_written < len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _read(fd: int, path: Path) -> Holder:
    try:
        record = json.loads(os.pread(fd, _RECORD_BYTES, 0))
        return Holder(int(record["pid"]), int(record["bytes"]), str(record["purpose"]))
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is no reservation ({error}); end the process that holds it") from error


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
