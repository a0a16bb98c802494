"""How one setting is declared: once, in the field that holds it; flags, TOML keys and the printed form all follow from it."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dynamo.kvcache.config import DiskPlace, parse_disk_place, parse_size

__all__ = [
    "EventSource",
    "Notation",
    "Option",
    "byte_size",
    "default_disk_place",
    "default_threads",
    "disk_place",
    "event_source",
    "file_path",
    "folder_path",
    "header_text",
    "number",
    "one_of",
    "option",
    "options_of",
    "or_word",
    "or_zero",
    "positive_size",
    "several",
    "switch",
    "text",
]

_ENDPOINT = re.compile(r"tcp://[^\s,]+:([0-9]{1,5})|ipc://[^\s,]+")


def _as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Notation:
    """How values of one kind are written.

    Attributes:
        parse: from a TOML value or the command line's text to the field's value; raises ValueError saying what is accepted.
        render: back to a TOML value, text, number or list of texts, that `parse` reads.
        is_list: the flag may be given several times, and TOML has a list.
    """

    parse: Callable[[Any], Any]
    render: Callable[[Any], Any] = _as_it_is
    is_list: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting.

    Attributes:
        name: the field's name, and the TOML key.
        flag: the command line's name; None for the positional argument.
        secret: never printed.
    """

    name: str
    flag: str | None
    metavar: str
    help: str
    notation: Notation
    secret: bool


def option(
    default: Any, help_text: str, notation: Notation, *, metavar: str, flag: str | None = "", secret: bool = False
) -> Any:
    """A dataclass field that is a setting. `default` may be a function for defaults that depend on the machine."""
    metadata = {"help": help_text, "notation": notation, "metavar": metavar, "flag": flag, "secret": secret}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(section: type) -> Iterator[Option]:
    """The settings of one section of the configuration, in their order."""
    for entry in fields(section):
        flag = entry.metadata["flag"]
        yield Option(
            name=entry.name,
            flag=f"--{entry.name.replace('_', '-')}" if flag == "" else flag,
            metavar=entry.metadata["metavar"],
            help=entry.metadata["help"],
            notation=entry.metadata["notation"],
            secret=entry.metadata["secret"],
        )


def or_word(notation: Notation, word: str) -> Notation:
    """Values of `notation`, or the word that stands for none of them: None."""

    def parse(value: Any) -> Any:
        if value == word:
            return None
        try:
            return notation.parse(value)
        except ValueError as error:
            raise ValueError(f'{error}, or "{word}"') from None

    return Notation(parse, lambda value: word if value is None else notation.render(value))


def several(notation: Notation) -> Notation:
    """A tuple of values of `notation`."""

    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError("a list")
        return tuple(notation.parse(item) for item in value)

    return Notation(parse, lambda values: [notation.render(value) for value in values], is_list=True)


def _parse_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("text that is not empty")
    return value


text = Notation(_parse_text)
"""Any text that is not empty."""


def _parse_header_text(value: Any) -> str:
    if not isinstance(value, str) or not value or value != value.strip() or not value.isprintable():
        raise ValueError("text without blanks at its ends, line breaks and the like: a client sends it in a header")
    return value


header_text = Notation(_parse_header_text)
"""Text that a client can send as the value of an HTTP header."""


def number(kind: type[int] | type[float], low: float, high: float) -> Notation:
    """A number from `low` to `high`."""
    accepted = f"an integer from {low} to {high}" if kind is int else f"a number from {low:g} to {high:g}"

    def parse(value: Any) -> int | float:
        try:
            if isinstance(value, bool) or (kind is int and isinstance(value, float)):
                raise ValueError
            result = kind(value)
        except (TypeError, ValueError):
            raise ValueError(accepted) from None
        if not low <= result <= high:
            raise ValueError(accepted)
        return result

    return Notation(parse)


def or_zero(notation: Notation) -> Notation:
    """Values of `notation`, or 0."""
    zero = number(float, 0, 0)

    def parse(value: Any) -> Any:
        try:
            return notation.parse(value)
        except ValueError as error:
            with contextlib.suppress(ValueError):
                return zero.parse(value)
            raise ValueError(f"{error}, or 0") from None

    return Notation(parse)


def one_of(*words: str) -> Notation:
    """One of a few words."""

    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return str(value)

    return Notation(parse)


def _sizes(accepted: str, low: int) -> Notation:
    def parse(value: Any) -> int:
        try:
            size = parse_size(value)
        except ValueError:
            raise ValueError(accepted) from None
        if size < low:
            raise ValueError(accepted)
        return size

    return Notation(parse, _render_bytes)


def _render_bytes(num_bytes: int) -> str:
    """The shortest exact form."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes and num_bytes % (1 << shift) == 0:
            return f"{num_bytes >> shift}{unit}"
    return str(num_bytes)


def _parse_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false, without quotes")
    return value


switch = Notation(_parse_switch)
"""Off or on: a flag without a value, true or false in TOML."""

byte_size = _sizes("a size such as 64MiB, 1.5GiB, 512MB or a number of bytes, less than 8EiB", 0)
"""Bytes of "64MiB", "1.5GB" or a plain number of bytes."""

positive_size = _sizes("a size above 0 such as 64MiB, 1.5GiB, 512MB or a number of bytes, less than 8EiB", 1)
"""The same where nothing would be a mistake."""


def _parse_path(value: Any, accepted: str) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(accepted)
    try:
        return Path(value).expanduser()
    except RuntimeError:  # no such user
        raise ValueError(f"{accepted}; ~NAME is the folder of a user of this machine") from None


def _parse_file(value: Any) -> Path:
    path = _parse_path(value, "the path of a file")
    if value.endswith("/"):
        raise ValueError("the path of a file")
    return path


file_path = Notation(_parse_file, str)
"""A file, which need not exist."""


folder_path = Notation(lambda value: _parse_path(value, "the path of a folder"), str)
"""A folder, which need not exist."""


@dataclass(frozen=True, slots=True)
class EventSource:
    """Where an engine of another make publishes its KV events.

    Attributes:
        endpoint: of its ZMQ PUB socket.
        replay: of the socket that repeats what was missed; None without one.
    """

    endpoint: str
    replay: str | None


def _parse_event_source(value: Any) -> EventSource | None:
    if value == "off":
        return None
    parts = value.split(",") if isinstance(value, str) else []
    if not 1 <= len(parts) <= 2 or not all(_is_endpoint(part) for part in parts):
        raise ValueError("tcp://HOST:PORT or ipc://PATH, the same again after a comma for its replay socket, or off")
    return EventSource(parts[0], parts[1] if len(parts) == 2 else None)


def _is_endpoint(value: str) -> bool:
    match = _ENDPOINT.fullmatch(value)
    return match is not None and (match[1] is None or 0 < int(match[1]) < 65536)


def _render_event_source(source: EventSource | None) -> str:
    if source is None:
        return "off"
    return source.endpoint if source.replay is None else f"{source.endpoint},{source.replay}"


event_source = Notation(_parse_event_source, _render_event_source)
"""ZMQ endpoints of KV events, or none."""


def _parse_disk_place(value: Any) -> DiskPlace:
    accepted = "PATH:SIZE such as /mnt/nvme/kv:200GiB, or PATH,PATH:SIZE; each path once, and a size above 0"
    if not isinstance(value, str):
        raise ValueError(accepted)
    try:
        return parse_disk_place(value)
    except ValueError:
        raise ValueError(accepted) from None


def _render_disk_place(place: DiskPlace) -> str:
    return f"{','.join(map(str, place.directories))}:{_render_bytes(place.capacity_bytes)}"


disk_place = Notation(_parse_disk_place, _render_disk_place)
"""Folders with a size."""


def default_disk_place() -> DiskPlace | None:
    """Up to 4 GiB in the user's cache folder, but never more than a tenth of what is free there; None when that is nothing."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # such are to be passed over (https://specifications.freedesktop.org/basedir-spec/)
        try:
            root = Path.home() / ".cache"
        except RuntimeError:  # a user without a home, as in some containers
            return None
    # `isdir` is False where it may not look.
    existing = next((folder for folder in (root, *root.parents) if os.path.isdir(folder)), None)
    if existing is None:
        return None
    capacity = min(4 << 30, shutil.disk_usage(existing).free // 10 >> 20 << 20)
    return DiskPlace((root / "dynamo" / "kv",), capacity) if capacity >= 64 << 20 else None


def default_threads() -> int:
    """One on small machines, else half the cores: threads that spin beside other work cost more than they give."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // 2)
