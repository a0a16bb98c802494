"""Sizes as people write them: "64MiB", "8GiB", "/mnt/nvme/kv:200GiB"."""

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from dynamo.kvcache.errors import CacheConfigError
from dynamo.tiers.write_budget import least_bytes_per_day

__all__ = ["DiskPlace", "check_write_budget", "format_size", "parse_disk_place", "parse_host_sizes", "parse_size"]

_UNITS: dict[str, int] = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}
_MAX_BYTES = 1 << 63
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_NOTATION = "write it as 64MiB, 8GiB, 1.5GB or a number of bytes"


def parse_size(text: str | int) -> int:
    """Bytes of "64MiB", "8GiB", "1.5GB" or a plain number of bytes.

    Raises:
        CacheConfigError: the text is no size.
    """
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise CacheConfigError(f"{text!r} is no size; {_NOTATION}")
    size: Decimal | int = text if isinstance(text, int) else _read_size(text)
    if size < 0:
        raise CacheConfigError(f"a size cannot be negative: {text}")
    if size >= _MAX_BYTES:
        raise CacheConfigError(f"{str(text)[:40]!r} is more than there is; a size is less than 8 EiB")
    if 0 < size < 1:
        raise CacheConfigError(f"{str(text)[:40]!r} is less than a byte; {_NOTATION}")
    return int(size)


def _read_size(text: str) -> Decimal:
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise CacheConfigError(f"{text!r} is no size; {_NOTATION}")
    return Decimal(match[1]) * unit


def format_size(num_bytes: int) -> str:
    """Bytes for people: 67108864 -> "64 MiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def check_write_budget(bytes_per_day: int, slot_bytes: int) -> None:
    """Whether a budget of writes lets blocks be written at all.

    Raises:
        CacheConfigError: it does not.
    """
    least_bytes = least_bytes_per_day(slot_bytes)
    if bytes_per_day < least_bytes:
        raise CacheConfigError(
            f"{format_size(bytes_per_day)} a day, of which an hour's share may be written at once, let no block of "
            f"{format_size(slot_bytes)} be written to disk; give at least {format_size(least_bytes)}, or no limit"
        )


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """Directories and the bytes the disk tier may use in them together.

    Attributes:
        directories: one, or several on different devices, over which blocks are spread; the first also holds the index.

    Raises:
        CacheConfigError: there is no directory.
    """

    directories: tuple[Path, ...]
    capacity_bytes: int

    def __post_init__(self) -> None:
        if not self.directories:
            raise CacheConfigError("a disk tier needs at least one directory")

    def below(self, name: str) -> "DiskPlace":
        """The directories of that name inside these, for a tier of its own."""
        return DiskPlace(tuple(directory / name for directory in self.directories), self.capacity_bytes)

    def __str__(self) -> str:
        """Its directories, as they are named in messages."""
        return ", ".join(str(directory) for directory in self.directories)


def parse_disk_place(text: str) -> DiskPlace:
    """Reads "PATH:SIZE" or "PATH,PATH:SIZE"; `~` is expanded. A path with a comma in it can be given as a `DiskPlace`.

    Raises:
        CacheConfigError: a path or the size is missing or wrong.
    """
    paths, separator, size = text.rpartition(":")
    if not separator or not all(paths.split(",")) or "\0" in paths:
        raise CacheConfigError(
            f"{text!r} is no disk tier; write it as PATH:SIZE, such as /mnt/nvme/kv:200GiB, or PATH,PATH:SIZE"
        )
    try:
        directories = tuple(Path(path).expanduser() for path in paths.split(","))
    except RuntimeError as error:  # no such user
        raise CacheConfigError(f"{text!r}: {error}; write the path in full") from error
    if len({directory.absolute() for directory in directories}) < len(directories):
        raise CacheConfigError(f"{text!r} names a path twice; give each once")
    capacity_bytes = parse_size(size)
    if not capacity_bytes:
        raise CacheConfigError(f"{text!r} is a disk tier that holds nothing; give it a size, or leave it out")
    return DiskPlace(directories, capacity_bytes)


def parse_host_sizes(host: str | int | None, host_max: str | int | None) -> tuple[int, int]:
    """Bytes of the host tier, 0 for none, and to how many it may be resized: without `host_max` no more than now.

    Raises:
        CacheConfigError: a size is wrong, or the tier is larger than `host_max`, or there is none to be resized.
    """
    host_bytes = parse_size(host) if host is not None else 0
    max_host_bytes = host_bytes if host_max is None else parse_size(host_max)
    if max_host_bytes < host_bytes or max_host_bytes > host_bytes == 0:
        raise CacheConfigError(
            f"a host tier of {format_size(host_bytes)} cannot be resized up to host_max={format_size(max_host_bytes)}; "
            "give a host tier, and at least its size"
        )
    return host_bytes, max_host_bytes
