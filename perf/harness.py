"""Measuring: CPU and wall time of repeated actions, and the CPU time of other processes."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "BenchmarkError",
    "Timing",
    "median",
    "percentile",
    "process_cpu_s",
    "process_tree_cpu_s",
    "quiet_collector",
    "timed",
]


class BenchmarkError(Exception):
    """A benchmark cannot run here. The message says why and what the user can do; no result is printed."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run.

    Attributes:
        cpu_s: processor time of all threads of this process.
        wall_s: elapsed time.
    """

    cpu_s: float
    wall_s: float


def timed(action: Callable[[], object]) -> Timing:
    """Runs `action` once."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return Timing(time.process_time() - cpu, time.perf_counter() - wall)


def median(values: Sequence[float]) -> float:
    """Middle value; of an even number, the mean of the middle two."""
    return float(statistics.median(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Smallest of `values` that is not below `percent` per cent of them (nearest rank).

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("there is no percentile of no values")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Moves what exists out of the garbage collector's sight for the block, as long-running servers do at start-up.

    The collector stays on: garbage that the measured code makes is still paid for by it.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def process_cpu_s(pid: int) -> float:
    """User and system seconds that process `pid` alone has used. See `process_tree_cpu_s`.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} has ended") from None
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def process_tree_cpu_s(pid: int) -> float:
    """User and system seconds that process `pid`, its living descendants and their reaped children have used.

    Read from /proc, in steps of one clock tick (10 ms as a rule): measure for seconds.

    Raises:
        ProcessLookupError: there is no such process.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while the folder was listed
        # The second field is the command in parentheses and may hold anything; fields from the third on are plain.
        fields = stat.rpartition(")")[2].split()
        parents[int(folder.name)] = int(fields[1])
        ticks[int(folder.name)] = sum(int(value) for value in fields[11:15])  # utime, stime, cutime, cstime
    if pid not in parents:
        raise ProcessLookupError(f"process {pid} has ended")
    tree, grown = {pid}, True
    while grown:
        children = {child for child, parent in parents.items() if parent in tree} - tree
        tree |= children
        grown = bool(children)
    return sum(ticks[member] for member in tree) / os.sysconf("SC_CLK_TCK")
