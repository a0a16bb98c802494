"""Sizes as people write them: "64MiB", "8GiB", "/mnt/nvme/kv:200GiB"."""

import re
from dataclasses import dataclass
from pathlib import Path

from dynamo.kvcache.errors import CacheConfigError

__all__ = ["DiskPlace", "format_size", "parse_disk_place", "parse_size"]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}
_MAX_BYTES = 1 << 63
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int) -> int:
    """Bytes of "64MiB", "8GiB", "1.5GB" or a plain number of bytes.

    Raises:
        CacheConfigError: the text is no size.
    """
    if isinstance(text, int):
        if text < 0:
            raise CacheConfigError(f"a size cannot be negative: {text}")
        return text
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise CacheConfigError(f"{text!r} is no size; write it as 64MiB, 8GiB, 500MB or a number of bytes")
    size = float(match[1]) * unit
    if size >= _MAX_BYTES:
        raise CacheConfigError(f"{text[:40]!r} is more than there is; a size is less than 8 EiB")
    return int(size)


def format_size(num_bytes: int) -> str:
    """Bytes for people: 67108864 -> "64 MiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """Folders and the bytes the disk tier may use in them together.

    Attributes:
        directory: the first, which also holds the index.
        further: more of them, on other devices; blocks are spread over all.
    """

    directory: Path
    capacity_bytes: int
    further: tuple[Path, ...] = ()

    @property
    def directories(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.directory, *self.further)


def parse_disk_place(text: str) -> DiskPlace:
    """Reads "PATH:SIZE" or "PATH,PATH:SIZE"; `~` is expanded. A path with a comma in it can be given as a `DiskPlace`.

    Raises:
        CacheConfigError: a path or the size is missing or wrong.
    """
    paths, separator, size = text.rpartition(":")
    directories = [Path(path).expanduser() for path in paths.split(",") if path]
    if not separator or not directories or len(directories) <= paths.count(","):
        raise CacheConfigError(
            f"{text!r} is no disk tier; write it as PATH:SIZE, such as /mnt/nvme/kv:200GiB, or PATH,PATH:SIZE"
        )
    return DiskPlace(directories[0], parse_size(size), tuple(directories[1:]))
