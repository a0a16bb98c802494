"""The sweep: one run for each size and depth, then single changes from the best of them. And what follows for the settings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from dynamo.kvcache.config import format_size
from dynamo.perf.disk_raw import EXTRA_FILES, QUEUE_DEPTH, RawDisk, Way
from dynamo.perf.report import Result

__all__ = ["Measured", "Sweep", "best", "candidate_depths", "recommended_threads", "sweep", "sweep_results"]

_GOOD_ENOUGH = 0.9  # of the best rate: fewer threads that reach it are better than more


@dataclass(frozen=True, slots=True)
class Measured:
    """One way's rates.

    Attributes:
        read, write: GB/s.
        change: what is other than in the sweep itself; empty for a way of the sweep.
    """

    way: Way
    read: float
    write: float
    change: str = ""

    def rate(self, *, writes: bool) -> float:
        """GB/s of one direction."""
        return self.write if writes else self.read


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is tried, and for how long each."""

    sizes: tuple[int, ...]
    depths: tuple[int, ...]
    limit_s: float

    @property
    def num_runs(self) -> int:
        """How many ways will be measured."""
        return len(self.sizes) * len(self.depths) + len(_VARIATIONS)


_VARIATIONS: tuple[tuple[str, Callable[[Way], Way]], ...] = (
    ("once more", lambda way: way),
    ("buffered (page cache)", lambda way: replace(way, is_direct=False)),
    (f"asynchronous, depth {QUEUE_DEPTH}", lambda way: replace(way, is_queued=True, depth=QUEUE_DEPTH)),
    ("memory in 4 KiB pages", lambda way: replace(way, has_huge_pages=False)),
    (f"{EXTRA_FILES} files in each folder", lambda way: replace(way, num_files=EXTRA_FILES)),
)


def sweep(disk: RawDisk, plan: Sweep, advance: Callable[[str], object]) -> list[Measured]:
    """Measures every size at every depth, then the variations of the best large-block way, one after the other.

    Args:
        advance: told before each way what is measured now.
    """
    found: list[Measured] = []
    for size in plan.sizes:
        for depth in plan.depths:
            advance(f"{format_size(size)} calls, depth {depth}")
            found.append(_measure(disk, Way(call_bytes=size, depth=depth), plan.limit_s))
    reference = max(found, key=lambda each: each.read + each.write).way
    for name, change in _VARIATIONS:
        advance(name)
        way = change(reference)
        if disk.can_queue or not way.is_queued:
            found.append(replace(_measure(disk, way, plan.limit_s), change=name))
    return found


def best(found: Sequence[Measured], *, writes: bool, call_bytes: int | None = None) -> Measured:
    """The fastest plain way (O_DIRECT, huge pages, one file), of one call size or of all."""
    plain = [each for each in _plain(found) if call_bytes in (None, each.way.call_bytes)]
    return max(plain, key=lambda each: each.rate(writes=writes))


def candidate_depths(found: Sequence[Measured], call_bytes: int, *, writes: bool) -> list[int]:
    """The two depths that served best: one run each is too few to tell which of them is the best."""
    plain = [each for each in _plain(found) if each.way.call_bytes == call_bytes]
    ranked = sorted(plain, key=lambda each: -each.rate(writes=writes))
    return sorted(each.way.depth for each in ranked[:2])


def recommended_threads(found: Sequence[Measured], block_sizes: Sequence[int]) -> int:
    """The smallest depth that comes within 10 % of the best at every block size, both ways; otherwise the best on average."""
    plain = [each for each in _plain(found) if each.way.call_bytes in block_sizes]

    def shares(depth: int) -> list[float]:
        return [
            each.rate(writes=writes) / best(found, writes=writes, call_bytes=each.way.call_bytes).rate(writes=writes)
            for each in plain
            if each.way.depth == depth
            for writes in (False, True)
        ]

    depths = sorted({each.way.depth for each in plain})
    enough = [depth for depth in depths if min(shares(depth)) >= _GOOD_ENOUGH]
    return enough[0] if enough else max(depths, key=lambda depth: min(shares(depth)))


def sweep_results(found: Sequence[Measured]) -> Iterator[Result]:
    """One row for each way, with shares of the fastest plain one."""
    tops = {writes: best(found, writes=writes).rate(writes=writes) for writes in (False, True)}
    for each in found:
        way = each.way
        case = "raw, one change" if each.change else f"raw, {format_size(way.call_bytes)} calls"
        subject = f"depth {way.depth}"
        if each.change:
            subject = f"{format_size(way.call_bytes)} calls, {subject}: {each.change}"
        for writes, metric in ((False, "read"), (True, "write")):
            rate = each.rate(writes=writes)
            yield Result(case=case, subject=subject, metric=metric, value=rate, unit="GB/s", samples=1)
            yield Result(
                case=case, subject=subject, metric=f"{metric} share", value=100 * rate / tops[writes], unit="%"
            )


def _measure(disk: RawDisk, way: Way, limit_s: float) -> Measured:
    write = disk.run(way, writes=True, limit_s=limit_s).gb_per_s
    return Measured(way, disk.run(way, writes=False, limit_s=limit_s).gb_per_s, write)


def _plain(found: Sequence[Measured]) -> list[Measured]:
    return [each for each in found if not each.change]
