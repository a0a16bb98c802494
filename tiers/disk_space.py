"""Whether the file systems below a disk tier have room for what the tier may take."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo.tiers.namespace import held_bytes

__all__ = ["DiskSpace", "disk_space", "find_obstacle"]


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


def find_obstacle(directory: Path) -> Path | None:
    """What lies in the way of a folder, such as a file of its name; None for nothing."""
    directory = directory.absolute()
    found = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    return None if os.path.isdir(found) else found


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
