"""One model's folder inside the disk tier's directory: its lock, its files, and its neighbours' share of the space.

directory/
    <16 hex digits>/      one per model and block layout
        LOCK              flock of the process using it; holds its process id; its time is that of the last use
        journal.log       index
        blocks.dat        slots
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
from pathlib import Path

from dynamo.tiers.errors import TierBusyError

__all__ = ["Namespace"]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}")
_LOCK, _JOURNAL, _BLOCKS = "LOCK", "journal.log", "blocks.dat"
_OWN_FILES = frozenset({_LOCK, _JOURNAL, _BLOCKS, _JOURNAL + ".tmp", "direct.probe"})


class Namespace:
    """A locked folder; owns the lock until `close`. Not thread-safe."""

    def __init__(self, directory: Path, fingerprint: bytes) -> None:
        """Creates the folder where needed and locks it.

        Args:
            directory: shared by all models; created where needed.
            fingerprint: names model and layout; its first 8 bytes name the folder.

        Raises:
            TierBusyError: another process, or another tier of this one, holds it.
            OSError: it cannot be created or locked.
        """
        self.directory = directory
        self.folder = directory / fingerprint[:8].ljust(8, b"\0").hex()
        self._make_folder()
        self._lock_fd: int | None = _lock(self.folder / _LOCK)

    @property
    def journal_path(self) -> Path:
        """Where the index lies."""
        return self.folder / _JOURNAL

    @property
    def blocks_path(self) -> Path:
        """Where the slots lie."""
        return self.folder / _BLOCKS

    def restore(self) -> None:
        """Makes folder and lock anew when they were deleted.

        Raises:
            TierBusyError: somebody else was faster.
            OSError: they cannot be created.
        """
        self._make_folder()
        if self._lock_fd is not None and os.fstat(self._lock_fd).st_nlink:
            return
        lock_fd = _lock(self.folder / _LOCK)
        self.close()
        self._lock_fd = lock_fd

    def make_room(self, own_bytes: int, capacity_bytes: int) -> bool:
        """Removes other namespaces, least recently used first, until they and `own_bytes` fit into `capacity_bytes`.

        Only folders that look like ours to the last file, and that nobody has locked, are touched.

        Returns:
            Whether it fits now.
        """
        neighbours = sorted((_last_use(folder), folder) for folder in self._neighbours())
        used_bytes = own_bytes + sum(_size(folder) for _, folder in neighbours)
        for _, folder in neighbours:
            if used_bytes <= capacity_bytes:
                break
            folder_bytes = _size(folder)
            if _remove(folder):
                used_bytes -= folder_bytes
                logger.info("removed KV blocks of another model, %d bytes, from %s", folder_bytes, folder)
        return used_bytes <= capacity_bytes

    def close(self) -> None:
        """Gives the lock back. Idempotent."""
        lock_fd, self._lock_fd = self._lock_fd, None
        if lock_fd is not None:
            with contextlib.suppress(OSError):
                os.utime(lock_fd)
            os.close(lock_fd)

    def _make_folder(self) -> None:
        """KV blocks tell what was in the prompts: nobody else may read them, nor put links in their place."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "is a link; a disk tier's own folder must not be", str(self.folder))

    def _neighbours(self) -> list[Path]:
        try:
            folders = [entry for entry in self.directory.iterdir() if _NAME.fullmatch(entry.name)]
        except OSError:
            return []
        return [folder for folder in folders if folder.name != self.folder.name and _is_ours(folder)]


def _is_ours(folder: Path) -> bool:
    try:
        if folder.is_symlink():
            return False
        names = {entry.name for entry in folder.iterdir()}
        return {_LOCK, _JOURNAL} <= names <= _OWN_FILES and all(
            stat.S_ISREG((folder / name).lstat().st_mode) for name in names
        )
    except OSError:
        return False


def _size(folder: Path) -> int:
    """Bytes on disk; 0 for what has gone meanwhile."""
    total = 0
    for name in _OWN_FILES:
        with contextlib.suppress(OSError):
            total += (folder / name).lstat().st_blocks * 512
    return total


def _last_use(folder: Path) -> float:
    times = [0.0]
    for name in (_LOCK, _JOURNAL):
        with contextlib.suppress(OSError):
            times.append((folder / name).lstat().st_mtime)
    return max(times)


def _remove(folder: Path) -> bool:
    """Deletes an unlocked namespace. The index goes first, so that a crash in between leaves nothing that is believed."""
    try:
        lock_fd = _lock(folder / _LOCK)
    except (TierBusyError, OSError):
        return False
    try:
        for name in (_JOURNAL, _JOURNAL + ".tmp", _BLOCKS, "direct.probe", _LOCK):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        logger.warning("could not remove %s: %s", folder, error)
        return False
    finally:
        os.close(lock_fd)
    return True


def _lock(path: Path) -> int:
    """Locks `path` for this descriptor and writes the process id into it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = _read_pid(fd)
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise TierBusyError(path, pid) from None
            raise
        if _is_at(fd, path):
            with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, only nameless
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            return fd
        os.close(fd)  # the holder removed the file between our open and our lock


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _read_pid(fd: int) -> int | None:
    try:
        return int(os.pread(fd, 32, 0))
    except (OSError, ValueError):
        return None
