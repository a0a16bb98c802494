"""A worker's name and its private folder, held for as long as the process lives.

```
DIR/<name>.lock   locked by the worker of that name; what is locked is never taken by another, what is not is nobody's
DIR/<name>.d/     0700, its sockets; in the folder for temporary files where that path would be too long for a socket
```

The kernel lets go of the lock however the process ended. What killed workers left is removed by the next that starts, of
whatever name; DIR itself is locked meanwhile, lest one be taken for running that only is about to be tidied up after.

DIR may be a folder that is used for other things as well, where `poetry.lock` or `cron.d` are somebody's: a lock is a worker's
only with the words in it that workers write, and what no worker can have made is neither removed nor replaced.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import xxhash

from dynamo.serve.errors import ConfigError
from dynamo.serve.path_refusal import path_refusal
from dynamo.serve.process_identity import is_running, machine_id
from dynamo.serve.registration_files import FILE_SUFFIX, make_private, read_entry

__all__ = ["MAX_SOCKET_PATH_BYTES", "WorkerClaim", "any_worker_in"]

MAX_SOCKET_PATH_BYTES: Final = 107
"""Longest path of a Unix socket on Linux: `sun_path` less the zero at its end."""

_LONGEST_FILE: Final = "replay.sock"
_ALONE_TIMEOUT_S: Final = 10.0
_ALONE_PAUSE_S: Final = 0.01
_LOCK_WORDS: Final = b"lock of a Dynamo KV worker\n"
_SOCKET_SUFFIX: Final = ".sock"


class WorkerClaim:
    """The right to a name in a discovery folder. Use as a context manager, or `close` it.

    Attributes:
        worker_id: the name.
        folder: for sockets; nobody else can enter it.
    """

    def __init__(self, directory: Path, worker_id: str, lock_fd: int) -> None:
        """Takes over `lock_fd`, which is locked; see `take`."""
        self.worker_id = worker_id
        self.folder = _private_folder(directory, worker_id)
        self._directory = directory
        self._lock_path = _lock_path(directory, worker_id)
        self._lock_fd = lock_fd

    @classmethod
    def take(cls, directory: Path, worker_id: str | None) -> "WorkerClaim":
        """Claims a name.

        Args:
            directory: made, for this user only, where it is missing.
            worker_id: None for the first of worker-0, worker-1, … that is free.

        Raises:
            ConfigError: the name is taken, or would be that of other files there, or the folder cannot be used.
        """
        try:
            make_private(directory)
            with _alone_in(directory) as is_alone:
                if is_alone:
                    _remove_leftovers(directory)
                for name in [worker_id] if worker_id is not None else _numbered():
                    if (strange := _strange_file(directory, name)) is not None:
                        if worker_id is None:
                            continue
                        raise ConfigError(
                            f"--worker-id {worker_id}: {strange} is no worker's, and would be lost; choose another name, or a "
                            "--discovery folder for workers alone"
                        )
                    lock_fd = _try_lock(_lock_path(directory, name))
                    if lock_fd is not None:
                        try:
                            return cls(directory, name, lock_fd)
                        except BaseException:
                            os.close(lock_fd)
                            raise
        except OSError as error:
            raise ConfigError(f"--discovery {directory}: {path_refusal(directory, error, 'folder')}") from error
        raise ConfigError(f"--worker-id {worker_id}: a worker of that name runs already; choose another, or auto")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the folder and gives the name back; leaves both alone where they are another's by now. Once only."""
        with contextlib.suppress(OSError):
            if self._has_name():
                shutil.rmtree(self.folder, ignore_errors=True)
                self._lock_path.unlink()
        os.close(self._lock_fd)

    def renew(self) -> bool:
        """Makes lock and folder again where somebody has removed them.

        Returns:
            False where the name is another worker's by now: its folder is left alone.

        Raises:
            OSError: they cannot be made.
        """
        make_private(self._directory)
        if not self._has_name():
            return False
        self.folder.mkdir(mode=0o700, exist_ok=True)
        return True

    def _has_name(self) -> bool:
        """Whether the name is still ours, after another try where the lock was removed.

        Where there is no folder to be locked nobody has the name.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._lock_path.lstat(), os.fstat(self._lock_fd)):
                return True
        try:
            with _alone_in(
                self._directory
            ):  # or a worker that starts might look at the lock, and be taken for its owner
                lock_fd = _try_lock(self._lock_path)
        except FileNotFoundError:
            return True
        if lock_fd is None:
            return False
        os.close(self._lock_fd)
        self._lock_fd = lock_fd
        return True

    def socket_path(self, name: str) -> str:
        """Where a socket of this name lies, such as "http"."""
        return str(self.folder / f"{name}{_SOCKET_SUFFIX}")


def any_worker_in(directory: Path) -> bool:
    """Whether a worker runs that has its name in this folder.

    Raises:
        OSError: that cannot be found out.
    """
    try:
        with _alone_in(directory):  # a worker that starts might find its own name locked
            return any(_is_locked(path) for path in directory.glob("*.lock"))
    except FileNotFoundError:
        return False


def _numbered() -> Iterator[str]:
    return (f"worker-{number}" for number in count())


def _lock_path(directory: Path, worker_id: str) -> Path:
    return directory / f"{worker_id}.lock"


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[bool]:
    """Keeps other workers from starting in a folder, for an instant; False where folders cannot be locked, as over NFS.

    Raises:
        OSError: somebody else does so and does not end.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield _lock_soon(fd)
    finally:
        os.close(fd)


def _lock_soon(fd: int) -> bool:
    deadline_s = time.monotonic() + _ALONE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_ALONE_PAUSE_S)
        except OSError:
            return False
        else:
            return True
    raise OSError(errno.EBUSY, f"another process has kept the folder locked for {_ALONE_TIMEOUT_S:g} s")


def _remove_leftovers(directory: Path) -> None:
    """Removes the files of workers that were killed. Those of running ones are locked, and others' are left alone."""
    for lock_path in directory.glob("*.lock"):
        with contextlib.suppress(OSError):
            if lock_path.lstat().st_uid != os.geteuid() or _content(lock_path) != _LOCK_WORDS:
                continue
            if (lock_fd := _try_lock(lock_path)) is not None:
                try:
                    _remove_files(directory, lock_path.stem)
                finally:
                    os.close(lock_fd)


def _remove_files(directory: Path, worker_id: str) -> None:
    """All that a worker whose lock is ours has left, unless it runs elsewhere, where locks may be kept to oneself."""
    if _strange_file(directory, worker_id) is not None:
        return
    registration = directory / f"{worker_id}{FILE_SUFFIX}"
    entry = read_entry(registration)
    if entry is None:
        if _size(registration) != 0:  # of another version, it may run elsewhere
            return
    elif entry.machine != machine_id() or is_running(entry.registration.pid, entry.started):
        return
    shutil.rmtree(_folder_of(directory, worker_id), ignore_errors=True)
    for path in (
        registration,
        *directory.glob(f".{glob.escape(worker_id)}{FILE_SUFFIX}.*"),
        _lock_path(directory, worker_id),
    ):
        path.unlink(missing_ok=True)


def _strange_file(directory: Path, worker_id: str) -> Path | None:
    """What lies at the places of a worker of this name and cannot be one's.

    Raises:
        OSError: it cannot be looked at.
    """
    # Of a worker that is just ending, each may go while it is looked at.
    lock, folder = _lock_path(directory, worker_id), _folder_of(directory, worker_id)
    words = b""
    with contextlib.suppress(FileNotFoundError):
        words = _content(lock)
    if words not in (b"", _LOCK_WORDS):
        return lock
    registration = directory / f"{worker_id}{FILE_SUFFIX}"
    # Power that fails may leave it empty; what lies beside a worker's lock is a worker's, if only of another version.
    if read_entry(registration) is None:
        size = _size(registration)
        if size is None or (size and not words):
            return registration
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return folder
    return None if all(name.endswith(_SOCKET_SUFFIX) for name in names) else folder


def _size(path: Path) -> int | None:
    """Of a file, in bytes: 0 where there is none, None for what is no file."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _content(path: Path) -> bytes:
    """As much of a file as tells a worker's lock from others."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.read(fd, len(_LOCK_WORDS) + 1)
    finally:
        os.close(fd)


def _try_lock(path: Path) -> int | None:
    """A descriptor of the locked file, which is made where it is missing; None where another process has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed it between the two calls: then what is locked is no longer at the path.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    os.pwrite(fd, _LOCK_WORDS, 0)
                    return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_locked(path: Path) -> bool:
    """Whether a process has locked a file; makes none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:  # its owner has ended meanwhile
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _folder_of(directory: Path, worker_id: str) -> Path:
    """Where a worker has its sockets; follows from its name, so that what a killed one left is found."""
    folder = directory.absolute() / f"{worker_id}.d"
    if len(os.fsencode(folder / _LONGEST_FILE)) > MAX_SOCKET_PATH_BYTES:
        place = xxhash.xxh3_64_hexdigest(os.fsencode(folder))
        folder = Path(tempfile.gettempdir()) / f"dynamo-{os.getuid()}-{place}"
    if len(os.fsencode(folder / _LONGEST_FILE)) > MAX_SOCKET_PATH_BYTES:
        raise OSError(
            errno.ENAMETOOLONG, f"the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes, unlike {folder}"
        )
    return folder


def _private_folder(directory: Path, worker_id: str) -> Path:
    folder = _folder_of(directory, worker_id)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)  # fails where it is another user's
    folder.mkdir(mode=0o700)
    return folder
