"""One model's folder inside the disk tier's directory: its lock, its files, and its neighbours' share of the space.

directory/
    <16 hex digits>/      one per model and block layout
        LOCK              flock of the process using it; holds its process id; its time is that of the last use
        STRIPE            what this folder is part of, see `identity`; written before what follows
        journal.log       index; in the first of several directories only
        budget.dat        what may still be written today, likewise, if that is limited
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

from dynamo.tiers.errors import TierBusyError, TierUnavailableError
from dynamo.tiers.identity import IDENTITY_NAME, read_identity
from dynamo.tiers.plain_file import open_plain

__all__ = [
    "BLOCKS_NAME",
    "JOURNAL_NAME",
    "LOCK_NAME",
    "Namespace",
    "find_namespaces",
    "find_unusable",
    "held_bytes",
    "is_namespace_name",
    "namespace_folder",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}")
LOCK_NAME, JOURNAL_NAME, BLOCKS_NAME, _BUDGET = "LOCK", "journal.log", "blocks.dat", "budget.dat"
# In the order in which they are deleted: after a crash in between, nothing that is left is believed, and it is still ours.
_OWN_FILES = (
    JOURNAL_NAME,
    JOURNAL_NAME + ".tmp",
    BLOCKS_NAME,
    _BUDGET,
    "direct.probe",
    IDENTITY_NAME + ".tmp",
    IDENTITY_NAME,
    LOCK_NAME,
)
_FIRST_FILES = frozenset({LOCK_NAME, IDENTITY_NAME + ".tmp"})  # all that a folder may hold before it has an identity


class Namespace:
    """A locked folder; owns the lock until `close`. Not thread-safe."""

    def __init__(self, directory: Path, fingerprint: bytes) -> None:
        """Creates the folder where needed and locks it.

        Args:
            directory: shared by all models; created where needed.
            fingerprint: names model and layout; its first 8 bytes name the folder.

        Raises:
            TierBusyError: another process, or another tier of this one, holds it.
            TierUnavailableError: there is a folder of that name with files in it, and it is none of ours.
            OSError: it cannot be created or locked.
        """
        self.directory = directory
        self.folder = namespace_folder(directory, fingerprint)
        self._make_folder()
        _check_is_ours_or_empty(self.folder)
        self._lock_fd: int | None = _lock(self.folder / LOCK_NAME)

    @property
    def journal_path(self) -> Path:
        """Where the index lies."""
        return self.folder / JOURNAL_NAME

    @property
    def budget_path(self) -> Path:
        """Where a write budget is remembered."""
        return self.folder / _BUDGET

    @property
    def identity_path(self) -> Path:
        """Where it says what the folder is part of."""
        return self.folder / IDENTITY_NAME

    @property
    def blocks_path(self) -> Path:
        """Where the slots lie."""
        return self.folder / BLOCKS_NAME

    def restore(self) -> None:
        """Makes folder and lock anew when they were deleted.

        Raises:
            TierBusyError: somebody else was faster.
            OSError: they cannot be created.
        """
        self._make_folder()
        if self._lock_fd is not None and os.fstat(self._lock_fd).st_nlink:
            return
        lock_fd = _lock(self.folder / LOCK_NAME)
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
            folders = find_namespaces(self.directory)
        except OSError:
            return []
        return [folder for folder in folders if folder.name != self.folder.name]


def namespace_folder(directory: Path, fingerprint: bytes) -> Path:
    """The folder inside `directory` of what `fingerprint` names; its first 8 bytes name the folder."""
    return directory / fingerprint[:8].ljust(8, b"\0").hex()


def find_namespaces(directory: Path) -> list[Path]:
    """Folders of disk tiers, in use or not, that look like ours to the last file; in order of their names.

    Raises:
        OSError: the directory cannot be listed.
    """
    return [entry for entry in _named_like_ours(directory) if _why_not_ours(entry) is None]


def find_unusable(directory: Path) -> list[tuple[Path, str]]:
    """Folders that are called like those of disk tiers and that none can use, and why; in order of their names.

    Raises:
        OSError: the directory cannot be listed.
    """
    found = ((entry, _why_not_ours(entry)) for entry in _named_like_ours(directory))
    return [(entry, why) for entry, why in found if why is not None]


def is_namespace_name(name: str) -> bool:
    """Whether a folder of this name may be one model's."""
    return _NAME.fullmatch(name) is not None


def _named_like_ours(directory: Path) -> list[Path]:
    return sorted(entry for entry in directory.iterdir() if is_namespace_name(entry.name) and entry.is_dir())


def held_bytes(directory: Path) -> int:
    """Bytes on disk of all disk tiers in `directory`.

    Raises:
        OSError: the directory cannot be listed.
    """
    return sum(_size(folder) for folder in find_namespaces(directory))


def _why_not_ours(folder: Path) -> str | None:
    """What is wrong with a folder that looks like ours; None for nothing, to the last file."""
    try:
        if folder.is_symlink():
            return f"{folder} is a link; a disk tier's own folder must not be"
        names = {entry.name for entry in folder.iterdir()}
        if strange := sorted(names - set(_OWN_FILES)):
            return f"{folder / strange[0]} is no file of a disk tier; move it away"
        if missing := sorted({LOCK_NAME, IDENTITY_NAME} - names):
            return f"{folder / missing[0]} is missing; delete the folder, or let a disk tier start empty there"
        for name in sorted(names):
            if not stat.S_ISREG((folder / name).lstat().st_mode):
                return f"{folder / name} is no plain file; delete it, and the blocks it stood for are computed again"
        read_identity(folder / IDENTITY_NAME)
    except TierUnavailableError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder} cannot be used: {error.strerror or error}"
    return None


def _check_is_ours_or_empty(folder: Path) -> None:
    """A folder of ours has an identity before it has anything else of value; what has not is somebody else's."""
    names = {entry.name for entry in folder.iterdir()}
    if IDENTITY_NAME not in names and names - _FIRST_FILES:
        raise TierUnavailableError(
            f"{folder} holds {sorted(names - _FIRST_FILES)[0]!r} but no file {IDENTITY_NAME}, so it is not a disk tier's; "
            "move it away or give the disk tier another directory",
            path=folder,
        )


def _size(folder: Path) -> int:
    """Bytes on disk; 0 for what has gone meanwhile."""
    total = 0
    for name in _OWN_FILES:
        with contextlib.suppress(OSError):
            total += (folder / name).lstat().st_blocks * 512
    return total


def _last_use(folder: Path) -> float:
    times = [0.0]
    for name in (LOCK_NAME, JOURNAL_NAME):
        with contextlib.suppress(OSError):
            times.append((folder / name).lstat().st_mtime)
    return max(times)


def _remove(folder: Path) -> bool:
    """Deletes an unlocked namespace."""
    try:
        lock_fd = _lock(folder / LOCK_NAME)
    except (TierBusyError, OSError):
        return False
    try:
        for name in _OWN_FILES:
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
        fd = open_plain(path, os.O_RDWR | os.O_CREAT)
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
