"""How much memory this process may have: the machine's, and the limits of its control groups, versions 1 and 2."""

from collections.abc import Callable, Iterator
from pathlib import Path

from dynamo.tiers.errors import TierMemoryError

__all__ = ["available_memory_bytes", "check_available", "memory_limit_bytes"]

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def available_memory_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Memory that can still be had without swapping: the smaller of the machine's and this process's cgroup's rest.

    Args:
        proc: where procfs is mounted.
        cgroups: where cgroup version 2 is mounted, or a folder with version 1's controllers.

    Returns:
        Bytes, or None where the system does not say.
    """
    rests = [_meminfo_bytes(proc, "MemAvailable"), *_over_groups(proc, cgroups, _rest_bytes_v2, _rest_bytes_v1)]
    return min((rest for rest in rests if rest is not None), default=None)


def check_available(needed_bytes: int, purpose: str) -> None:
    """Whether so much memory can still be had.

    Args:
        purpose: what it is for, such as "the host tier".

    Raises:
        TierMemoryError: it cannot.
    """
    available_bytes = available_memory_bytes()
    if available_bytes is not None and needed_bytes > available_bytes:
        raise TierMemoryError(
            f"{purpose} needs {needed_bytes / 2**30:.2f} GiB, {available_bytes / 2**30:.2f} GiB are available; "
            "make it smaller or free memory",
            needed_bytes=needed_bytes,
            available_bytes=available_bytes,
        )


def memory_limit_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """All the memory that this process and others of its cgroup could have, were nothing else running.

    Returns:
        Bytes: the smaller of the machine's memory and the tightest cgroup limit; None where the system does not say.
    """
    limits = [_meminfo_bytes(proc, "MemTotal"), *_over_groups(proc, cgroups, _limit_bytes_v2, _limit_bytes_v1)]
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo_bytes(proc: Path, field: str) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _over_groups(
    proc: Path, cgroups: Path, of_v2: Callable[[Path], int | None], of_v1: Callable[[Path], int | None]
) -> Iterator[int | None]:
    """What `of_v2` or `of_v1` says of each group from this process's up to the root of its hierarchy."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # hierarchy:controllers:path; version 2 has hierarchy 0 and no controllers
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            yield from map(of_v2, _with_parents(cgroups, path))
        elif "memory" in controllers.split(","):
            yield from map(of_v1, _with_parents(cgroups / "memory", path))


def _with_parents(root: Path, path: str) -> list[Path]:
    """The group's folder and those above it. In a container the lower ones may be missing, and the root is its own."""
    group = root / path.lstrip("/")
    return [group, *(parent for parent in group.parents if parent == root or root in parent.parents)]


def _rest_bytes_v2(group: Path) -> int | None:
    """What is left below the group's limit; page cache counts as free."""
    limit_bytes = _limit_bytes_v2(group)
    return limit_bytes and _rest_bytes(group, limit_bytes, "memory.current", ("inactive_file", "active_file"))


def _rest_bytes_v1(group: Path) -> int | None:
    limit_bytes = _limit_bytes_v1(group)
    cache = ("total_inactive_file", "total_active_file")
    return limit_bytes and _rest_bytes(group, limit_bytes, "memory.usage_in_bytes", cache)


def _rest_bytes(group: Path, limit_bytes: int, usage: str, cache: tuple[str, ...]) -> int | None:
    try:
        used_bytes = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit_bytes - used_bytes + sum(int(stat[name]) for name in cache))
    except (OSError, KeyError, ValueError):
        return None  # a container may hide parts of its groups


def _limit_bytes_v2(group: Path) -> int | None:
    return _limit_bytes(group / "memory.max")  # the machine's root group has no such file


def _limit_bytes_v1(group: Path) -> int | None:
    return _limit_bytes(group / "memory.limit_in_bytes")  # "no limit" is a number beyond any machine's memory


def _limit_bytes(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max"
        return None
