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
    """A folder and the bytes the disk tier may use in it."""

    directory: Path
    capacity_bytes: int


def parse_disk_place(text: str) -> DiskPlace:
    """Reads "PATH:SIZE"; `~` is expanded.

    Raises:
        CacheConfigError: the path or the size is missing or wrong.
    """
    path, separator, size = text.rpartition(":")
    if not separator or not path:
        raise CacheConfigError(f"{text!r} is no disk tier; write it as PATH:SIZE, such as /mnt/nvme/kv:200GiB")
    return DiskPlace(Path(path).expanduser(), parse_size(size))
