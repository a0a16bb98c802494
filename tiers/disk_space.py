"""Whether the file systems below a disk tier have room for what the tier may take."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo.tiers.namespace import held_bytes

__all__ = ["DiskSpace", "describe_shortage", "disk_space", "find_obstacle", "why_unusable"]


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """Room on one file system, in bytes.

    Attributes:
        directories: those of a disk tier that lie there.
        wanted_bytes: what the tier may take in them together.
        held_bytes: what disk tiers have in them already, of all models; others make way for the tier that grows.
        free_bytes: what else this user may take.
    """

    directories: tuple[Path, ...]
    wanted_bytes: int
    held_bytes: int
    free_bytes: int

    @property
    def missing_bytes(self) -> int:
        """By how much the tier is larger than what it can have; 0 when it fits."""
        return max(0, self.wanted_bytes - self.held_bytes - self.free_bytes)


def disk_space(directories: Sequence[Path], capacity_bytes: int) -> list[DiskSpace]:
    """The file systems of a disk tier that may take `capacity_bytes` in equal shares; for one to be made, of where it will lie.

    Raises:
        OSError: a file system cannot be asked.
    """
    by_device: dict[int, list[Path]] = {}
    for directory in directories:
        by_device.setdefault(_existing(directory).stat().st_dev, []).append(directory)
    spaces = []
    for members in by_device.values():
        status = os.statvfs(_existing(members[0]))
        spaces.append(
            DiskSpace(
                tuple(members),
                capacity_bytes // len(directories) * len(members),
                sum(held_bytes(member) for member in members if member.is_dir()),
                status.f_bavail * status.f_frsize,
            )
        )
    return spaces


def describe_shortage(directories: Sequence[Path], capacity_bytes: int) -> str | None:
    """What file systems lack for `capacity_bytes`, and the way out; None for nothing.

    No error: space may be freed, and until then the tier makes do with what there is.
    """
    try:
        spaces = disk_space(directories, capacity_bytes)
    except OSError as error:
        return f"disk tier {', '.join(map(str, directories))}: free space is not known: {error}"
    missing = [
        f"disk tier {', '.join(map(str, space.directories))}: may take {space.wanted_bytes:,} bytes, but the file system has "
        f"{space.free_bytes:,} bytes free, beside {space.held_bytes:,} that KV blocks hold already: "
        f"{space.missing_bytes:,} too few. Once it is full, blocks are not kept: free space there, or make the disk tier "
        "smaller"
        for space in spaces
        if space.missing_bytes
    ]
    return "; ".join(missing) or None


def why_unusable(directories: Sequence[Path], error: OSError) -> str:
    """Why a disk tier cannot be in some folders, and the way out."""
    where = error.filename or ", ".join(map(str, directories))
    for directory in directories:
        if (obstacle := find_obstacle(directory)) is not None:
            which = "this" if obstacle == directory.absolute() else obstacle
            return f"the disk tier cannot be in {directory}: {which} is no folder; move it away, or give another path"
    return (
        f"the disk tier cannot use {where}: {error.strerror or error}; check that this user may write there, and that nobody "
        "else changed its files"
    )


def find_obstacle(directory: Path) -> Path | None:
    """What lies in the way of a folder, such as a file of its name; None for nothing."""
    directory = directory.absolute()
    found = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    return None if os.path.isdir(found) else found


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
