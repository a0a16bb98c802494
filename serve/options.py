"""How one setting is declared: once, in the field that holds it; flags, TOML keys and the printed form all follow from it."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from dynamo.kvcache.config import DiskPlace, parse_disk_place, parse_size

__all__ = [
    "Option",
    "byte_size",
    "byte_size_or_auto",
    "default_disk_place",
    "default_threads",
    "disk_place",
    "format_bytes",
    "format_disk_place",
    "number",
    "one_of",
    "option",
    "options_of",
    "text",
]

Parse = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting.

    Attributes:
        name: the field's name, and the TOML key.
        flag: the command line's name; None for the positional argument.
        parse: from a TOML value or the command line's text to the field's value; raises ValueError saying what is accepted.
        secret: never printed.
    """

    name: str
    flag: str | None
    metavar: str
    help: str
    default: Any
    parse: Parse
    secret: bool


def option(
    default: Any, help_text: str, parse: Parse, *, metavar: str, flag: str | None = "", secret: bool = False
) -> Any:
    """A dataclass field that is a setting. `default` may be a function for defaults that depend on the machine."""
    metadata = {"help": help_text, "parse": parse, "metavar": metavar, "flag": flag, "secret": secret}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(section: type) -> Iterator[Option]:
    """The settings of one section of the configuration, in their order."""
    for entry in fields(section):
        metadata = entry.metadata
        flag = metadata["flag"]
        yield Option(
            name=entry.name,
            flag=f"--{entry.name.replace('_', '-')}" if flag == "" else flag,
            metavar=metadata["metavar"],
            help=metadata["help"],
            default=_default_of(entry),
            parse=metadata["parse"],
            secret=metadata["secret"],
        )


def _default_of(entry: "Field[Any]") -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def text(value: Any) -> str:
    """Any text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("text that is not empty")
    return value


def number(kind: type[int] | type[float], low: float, high: float, *, word: str | None = None) -> Parse:
    """A number from `low` to `high`, or the word that stands for leaving it to the server (None)."""

    def parse(value: Any) -> int | float | None:
        accepted = f"{'an integer' if kind is int else 'a number'} from {low:g} to {high:g}" + (
            f', or "{word}"' if word else ""
        )
        if word is not None and value == word:
            return None
        try:
            if isinstance(value, bool) or (kind is int and isinstance(value, float)):
                raise ValueError
            result = kind(value)
        except (TypeError, ValueError):
            raise ValueError(accepted) from None
        if not low <= result <= high:
            raise ValueError(accepted)
        return result

    return parse


def one_of(*words: str) -> Parse:
    """One of a few words."""

    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return str(value)

    return parse


def byte_size(value: Any) -> int:
    """Bytes of "64MiB", "1.5GB" or a plain number of bytes."""
    accepted = "a size such as 64MiB, 1GiB, 512MB or a number of bytes"
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(accepted)
    try:
        return parse_size(value)
    except ValueError:
        raise ValueError(accepted) from None


def byte_size_or_auto(value: Any) -> int | None:
    """A size, or None for "auto"."""
    return None if value == "auto" else byte_size(value)


def disk_place(value: Any) -> DiskPlace | None:
    """A folder with a size, or None for "off"."""
    if value in ("off", "0"):
        return None
    accepted = 'PATH:SIZE such as /mnt/nvme/kv:200GiB, or "off"'
    if not isinstance(value, str):
        raise ValueError(accepted)
    try:
        return parse_disk_place(value)
    except ValueError:
        raise ValueError(accepted) from None


def default_disk_place() -> DiskPlace | None:
    """Up to 4 GiB in the user's cache folder, but never more than a tenth of what is free there; None when that is nothing."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    existing = next((folder for folder in (root, *root.parents) if folder.is_dir()), None)
    if existing is None:
        return None
    capacity = min(4 << 30, shutil.disk_usage(existing).free // 10 >> 20 << 20)
    return DiskPlace(root / "dynamo" / "kv", capacity) if capacity >= 64 << 20 else None


def default_threads() -> int:
    """One on small machines, else half the cores: threads that spin beside other work cost more than they give."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // 2)


def format_bytes(num_bytes: int) -> str:
    """The shortest exact form that `byte_size` reads back."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes and num_bytes % (1 << shift) == 0:
            return f"{num_bytes >> shift}{unit}"
    return str(num_bytes)


def format_disk_place(place: DiskPlace | None) -> str:
    """What `disk_place` reads back."""
    return "off" if place is None else f"{place.directory}:{format_bytes(place.capacity_bytes)}"
