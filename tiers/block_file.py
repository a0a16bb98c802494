"""A file of slots, opened past the page cache where that works, and what its failures are called."""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
from pathlib import Path
from threading import Lock
from typing import Self

from dynamo.tiers.plain_file import open_plain

__all__ = ["BlockFile", "fault_kind"]

logger = logging.getLogger(__name__)

_FAULT_KINDS = {
    errno.ENOSPC: "disk_full",
    errno.EFBIG: "disk_full",
    errno.EDQUOT: "quota_exceeded",
    errno.EROFS: "read_only",
    errno.EACCES: "no_permission",
    errno.EPERM: "no_permission",
}


class BlockFile:
    """An open file of slots. Owns its descriptor; the opener closes it when no call uses it any more."""

    def __init__(self, path: Path) -> None:
        """Opens or creates `path`, with O_DIRECT where writing and reading back a page that way proves to work.

        Raises:
            OSError: the file cannot be opened for reading and writing.
        """
        self.path = path
        self.is_direct = _can_use_direct(path.parent)
        self.fd = open_plain(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if self.is_direct else 0))
        self._lock = Lock()

    @classmethod
    def open_to_read(cls, path: Path) -> Self:
        """Opens an existing file for reading only and creates nothing beside it; with O_DIRECT where that opens.

        Raises:
            OSError: the file cannot be opened.
        """
        file = cls.__new__(cls)
        file.path = path
        try:
            file.fd = open_plain(path, os.O_RDONLY | os.O_DIRECT)
            file.is_direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file.fd = open_plain(path, os.O_RDONLY)
            file.is_direct = False
        file._lock = Lock()
        return file

    def use_buffered(self) -> bool:
        """Gives up O_DIRECT for this file. True for the one caller that changed it."""
        with self._lock:
            if not self.is_direct:
                return False
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            self.is_direct = False
            return True

    def close(self) -> None:
        """Closes the descriptor; call once."""
        os.close(self.fd)


def fault_kind(error: OSError) -> str:
    """What the counters call a failed system call."""
    return _FAULT_KINDS.get(error.errno or 0, "io_error")


def _can_use_direct(folder: Path) -> bool:
    """Proves O_DIRECT in `folder` by writing a page and reading it back."""
    probe = folder / "direct.probe"
    page = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    view = memoryview(page)
    try:
        probe.unlink(missing_ok=True)  # left by a crash
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, 0o600)
    except OSError as error:
        logger.info("%s does not support O_DIRECT (%s): the disk tier goes through the page cache", folder, error)
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        return False
    try:
        view[: mmap.PAGESIZE] = os.urandom(mmap.PAGESIZE)
        written = os.pwritev(fd, [view[: mmap.PAGESIZE]], 0)
        read = os.preadv(fd, [view[mmap.PAGESIZE :]], 0)
        return written == read == mmap.PAGESIZE and view[: mmap.PAGESIZE] == view[mmap.PAGESIZE :]
    except OSError as error:
        if fault_kind(error) in ("disk_full", "quota_exceeded"):
            return True  # nothing can be proven on a full disk; a later EINVAL still falls back
        logger.info("%s does not support O_DIRECT (%s): the disk tier goes through the page cache", folder, error)
        return False
    finally:
        os.close(fd)
        view.release()
        page.close()
        with contextlib.suppress(OSError):
            probe.unlink()
