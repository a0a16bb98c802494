"""A folder for temporary files that is one process's own, and goes with it, however the process ends.

It is locked for as long as its process runs. The kernel lets go of the lock even of a killed one, so that what is locked
nowhere is nobody's, whichever machine's or container's pids its owner was counted among. The next process that starts removes
such folders.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

__all__ = ["private_folder"]

_PREFIX: Final = "dynamo-front-"


@contextlib.contextmanager
def private_folder(is_in_use: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder of this process's own, gone at the end of the block with all that is in it.

    Args:
        is_in_use: whether others still use a folder whose owner has gone; it stays then, for the next one to remove.
    """
    _remove_leftovers(Path(tempfile.gettempdir()), is_in_use)
    folder, lock = _make()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make() -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))  # 0700
        # Whoever tidies up folders for temporary files passes over locked ones: workers that are restarted after weeks still
        # read their settings here (https://systemd.io/TEMPORARY_DIRECTORIES/).
        with contextlib.suppress(FileNotFoundError):  # taken for a leftover, before it was locked
            lock = _opened(folder)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _remove_leftovers(parent: Path, is_in_use: Callable[[Path], bool]) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # locked, gone meanwhile, no folder or another user's
            lock = _opened(folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.geteuid() and not is_in_use(folder):
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
