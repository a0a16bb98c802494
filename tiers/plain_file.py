"""Opens the disk tier's own files, and nothing that somebody put in their place."""

import errno
import os
import stat
from pathlib import Path

__all__ = ["open_plain"]


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of the plain file at `path`, made for this user alone where `flags` say so. Follows no link, never waits.

    Raises:
        OSError: it cannot be opened, or something else is there, such as a pipe, whose opening waits for its other end.
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        raise
    except OSError:
        _check_plain(path, path.lstat().st_mode)  # which says more than the error does
        raise
    try:
        _check_plain(path, os.fstat(fd).st_mode)
        os.set_blocking(fd, True)  # or asynchronous I/O would fail with EAGAIN where it had to wait
    except OSError:
        os.close(fd)
        raise
    return fd


def _check_plain(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "is a link, which could lead anywhere" if stat.S_ISLNK(mode) else "is no plain file"
        raise OSError(errno.EINVAL, what, str(path))
