"""What options of several commands are checked for, before anything is measured. Messages name the option and its value."""

import math
import shutil
from pathlib import Path

from dynamo.kvcache.config import format_size, parse_size
from dynamo.kvcache.errors import CacheConfigError
from dynamo.perf.harness import BenchmarkError

__all__ = ["check_above_0", "check_at_least_1", "check_folder", "checked_size"]


def checked_size(flag: str, text: str) -> int:
    """Bytes of an option such as "64MiB".

    Raises:
        BenchmarkError: it is no size.
    """
    try:
        return parse_size(text)
    except CacheConfigError as error:
        raise BenchmarkError(f"{flag}: {error}") from error


def check_folder(path: Path, needed_bytes: int = 0) -> None:
    """Whether `--path` names a folder with so much space free.

    Raises:
        BenchmarkError: it does not.
    """
    if not path.is_dir():
        raise BenchmarkError(f"--path {path} is no folder; make it, or give one that is there")
    if (free_bytes := shutil.disk_usage(path).free) < needed_bytes:
        raise BenchmarkError(
            f"--path {path} has {format_size(free_bytes)} free and this run takes up to {format_size(needed_bytes)} for a "
            "while; measure less, or give another --path"
        )


def check_at_least_1(**values: int) -> None:
    """Options by their names, with _ for -.

    Raises:
        BenchmarkError: one is less.
    """
    for name, value in values.items():
        if value < 1:
            raise BenchmarkError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")


def check_above_0(**values: float) -> None:
    """Options by their names, with _ for -, that are no counts.

    Raises:
        BenchmarkError: one is not above 0, or endless.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise BenchmarkError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
