"""Errors of the tiers.

TierError
├── TierConfigError        a size, capacity or device given to a tier is wrong
├── TierMemoryError        the memory asked for cannot be had
├── TierClosedError        a tier is used after close()
├── TierBusyError          another process holds the disk tier's folder
├── TierUnavailableError   the disk tier's folder cannot be used at all, or belongs to something else
└── JournalFormatError     an index file is foreign, from another version, or damaged in its header

Faults of single blocks (a short read, a full disk) are results, not exceptions: see `Tier.read` and `Tier.write`.
Wrong ids and row shapes raise `dynamo.kernels.checks.KernelArgumentError`.
"""

from pathlib import Path

__all__ = [
    "JournalFormatError",
    "TierBusyError",
    "TierClosedError",
    "TierConfigError",
    "TierError",
    "TierMemoryError",
    "TierUnavailableError",
]


class TierError(Exception):
    """Root of all errors raised by `dynamo.tiers`."""


class TierConfigError(TierError, ValueError):
    """A tier cannot be built from the given sizes or device. The message names the value and the way out."""


class TierMemoryError(TierError, MemoryError):
    """A tier's arena does not fit into memory; ask for less.

    Attributes:
        needed_bytes: what the arena needs.
        available_bytes: what the machine, or this process's cgroup, can still give; None where unknown.
    """

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int | None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class TierClosedError(TierError):
    """A tier was used after `close()`."""


class TierBusyError(TierError):
    """Another process writes to this disk tier; stop it or give this one another folder.

    Attributes:
        path: the lock file.
        pid: the process that wrote itself into the lock file, or None if unreadable.
    """

    def __init__(self, path: Path, pid: int | None) -> None:
        holder = "another process" if pid is None else f"process {pid}"
        super().__init__(f"{path} is held by {holder}; stop it or choose another folder for the disk tier")
        self.path = path
        self.pid = pid


class TierUnavailableError(TierError):
    """The disk tier's folder cannot be created, read or written, or is not this tier's; go on without a disk tier.

    Attributes:
        path: the file or folder at fault.
    """

    def __init__(self, message: str, *, path: Path) -> None:
        super().__init__(message)
        self.path = path


class JournalFormatError(TierError):
    """An index file's header does not match: foreign, another version, another model or damaged.

    Attributes:
        path: the index file.
        is_other_version: whether another version of this program wrote it, and may still want it.
    """

    def __init__(self, message: str, *, path: Path, is_other_version: bool = False) -> None:
        super().__init__(message)
        self.path = path
        self.is_other_version = is_other_version
