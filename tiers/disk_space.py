"""Whether the file systems below a disk tier have room for what the tier may take."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo.tiers.namespace import held_bytes

__all__ = ["DiskSpace", "disk_space", "warn_of_shortage"]

logger = logging.getLogger(__name__)


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


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def warn_of_shortage(directories: Sequence[Path], capacity_bytes: int) -> None:
    """No error: space may be freed, and until then the tier makes do with what there is."""
    try:
        spaces = disk_space(directories, capacity_bytes)
    except OSError as error:
        logger.warning("disk tier %s: free space is not known: %s", ", ".join(map(str, directories)), error)
        return
    for space in spaces:
        if space.missing_bytes:
            logger.warning(
                "disk tier %s: may take %s bytes, but the file system has %s bytes free, beside %s that KV blocks hold "
                "already: %s too few. Once it is full, blocks are not kept: free space there, or make the disk tier smaller",
                ", ".join(str(directory) for directory in space.directories),
                *(f"{n:,}" for n in (space.wanted_bytes, space.free_bytes, space.held_bytes, space.missing_bytes)),
            )
