"""The tuning run for disk offload: what this disk gives, how to ask for it, and how much of it the disk tier gets.

Three parts, in files of their own that are removed in the end: a sweep of the raw device; the disk tier with blocks of 2
MiB and of 64 KiB, in turn with the raw device at its best depth and with LMCache's back-end where its interpreter is given;
and GPU memory with GPUDirect Storage where that is there.
"""

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dynamo.kvcache.config import format_size
from dynamo.perf.disk_gds import gds_results, why_no_gds
from dynamo.perf.disk_plot import draw_disk
from dynamo.perf.disk_raw import EXTRA_FILES, RawDisk
from dynamo.perf.disk_sweep import (
    Measured,
    Sweep,
    best,
    candidate_depths,
    recommended_threads,
    sweep,
    sweep_results,
)
from dynamo.perf.disk_tier import Comparison, LMCachePeer, TierSide, Windows, compare
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.machine import machine_record
from dynamo.perf.option_checks import check_folder, checked_size
from dynamo.perf.report import Report, Result

__all__ = ["BLOCK_SIZES", "SUMMARY", "add_arguments", "recommendation", "run"]

SUMMARY = "tunes disk offload: sweeps the raw disk, measures the disk tier beside it, recommends settings"

BLOCK_SIZES = (2 << 20, 64 << 10)
"""A block of an 8B-class model, and of a small one."""

_FULL = Sweep((16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20, 8 << 20), (1, 2, 4, 8, 16, 32), 0.4)
_QUICK = Sweep((64 << 10, 2 << 20), (1, 4, 16), 0.2)
_REPEATS, _QUICK_REPEATS = 9, 3
_WINDOWS = 2
_MIN_SIZE = 32 << 20
_MAX_WINDOW_BYTES = {2 << 20: 256 << 20, 64 << 10: 128 << 20}  # of small blocks fewer: each is a file to LMCache
_DEFAULT_WORKERS = 4  # LMCache's
_SPARE_BYTES = 64 << 20
_SHARE_OF_FREE = 0.8  # of the space that is free, for the recommended size


@dataclass(frozen=True, slots=True)
class _Place:
    """Folders of this run, and how much is measured in them."""

    folders: tuple[Path, ...]
    size: int

    def window(self, block_bytes: int) -> int:
        """Bytes moved by one call of a tier with such blocks."""
        largest = max(BLOCK_SIZES)
        return min(_MAX_WINDOW_BYTES[block_bytes], self.size // _WINDOWS) // largest * largest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    place = parser.add_argument_group("place")
    place.add_argument(
        "--path", metavar="DIR", type=Path, action="append", required=True,
        help="folder on the disk to tune; repeatable, for a tier striped over several disks",
    )  # fmt: skip
    workload = parser.add_argument_group("workload")
    workload.add_argument(
        "--size", default="1GiB", help="bytes measured; about twice as much space is taken, and given back"
    )
    workload.add_argument("--quick", action="store_true", help="a coarse sweep and few turns: seconds, not minutes")
    peer = parser.add_argument_group("peer")
    peer.add_argument(
        "--lmcache-python", metavar="PATH", type=Path, help="interpreter that has LMCache; measured in turn"
    )


def run(options: argparse.Namespace, console: Console) -> Report:
    """Sweeps, compares and recommends.

    Raises:
        BenchmarkError: a path is no folder or has too little space, there is no direct I/O, or a peer does not run.
        OSError: the disk refuses.
    """
    size = _checked_size(options)
    plan, repeats = (_QUICK, _QUICK_REPEATS) if options.quick else (_FULL, _REPEATS)
    machine = machine_record()
    notes: list[str] = []
    with _scratch(options.path) as folders, _progress(console, plan, repeats) as progress:
        place = _Place(folders, size)
        results, found = _measure(place, plan, repeats, options.lmcache_python, progress, notes)
    threads = recommended_threads(found, BLOCK_SIZES)
    top = [best(found, writes=writes) for writes in (False, True)]
    notes[:0] = [
        "raw: threads of preadv and pwritev with O_DIRECT on random bytes at shuffled places; depth is the number of "
        "threads, each with one call outstanding",
        "shares of the raw rows: of the fastest one; shares of blocks: of the raw device with calls of that size on the "
        "tier's own file and memory, by threads at the better of its two best depths or by asynchronous requests, in "
        "shuffled or ascending order, whichever is fastest, turn by turn, medians; no two blocks of a call lie side by side "
        "on the disk; every byte the tiers gave back was compared",
        *(
            f"fastest {name}s: {each.rate(writes=writes):.2f} GB/s with {format_size(each.way.call_bytes)} calls, "
            f"depth {each.way.depth}"
            for name, each, writes in (("read", top[0], False), ("write", top[1], True))
        ),
        f"recommended io_threads: {threads}, the fewest within 10 % of the best at 2 MiB and 64 KiB",
    ]
    report = Report(
        benchmark="disk",
        title=f"Disk: the raw device, and what tiers get of it ({format_size(size)}, folders: {len(folders)})",
        machine=machine,
        parameters={"size": size, "folders": len(folders), "quick": int(options.quick), "repeats": repeats},
        results=results,
        notes=notes,
        epilogue=("", "settings for python -m dynamo.serve --config FILE:", "", recommendation(options.path, threads)),
    )
    if options.out is not None:
        stamp = datetime.fromisoformat(machine.started).strftime("%Y%m%dT%H%M%SZ")
        picture = options.out / f"disk-{stamp}.png"
        notes.append(draw_disk(report, found, picture) or f"plot: {picture.name}")
    return report


def recommendation(paths: Sequence[Path], threads: int) -> str:
    """A TOML table that `--config` of the server reads: the disk tier there, of most of the space that is free."""
    lines = ["[cache]"]
    for number, path in enumerate(paths):
        free_bytes = shutil.disk_usage(path).free
        capacity = max(1, int(_SHARE_OF_FREE * free_bytes) >> 30)
        text = str(path.resolve() / "kv").replace("\\", "\\\\").replace('"', '\\"')
        comment = f"# {_SHARE_OF_FREE:.0%} of the {format_size(free_bytes)} that are free now"
        lines.append(f'{"# or: " if number else ""}disk_cache = "{text}:{capacity}GiB"  {comment}')
    return "\n".join([*lines, f"io_threads = {threads}"])


def _checked_size(options: argparse.Namespace) -> int:
    size = checked_size("--size", options.size) // (1 << 20) << 20
    if size < _MIN_SIZE:
        raise BenchmarkError(f"--size {options.size} is too little to measure; give at least {format_size(_MIN_SIZE)}")
    if len({path.resolve() for path in options.path}) < len(options.path):
        raise BenchmarkError(f"--path names a folder twice: {', '.join(map(str, options.path))}; give each once")
    # The raw files, and then beside them a tier, and then LMCache's files.
    needed = size + EXTRA_FILES * size // 4 + size + (size if options.lmcache_python else 0) + _SPARE_BYTES
    for path in options.path:
        check_folder(path, needed)
    return size


def _measure(
    place: _Place, plan: Sweep, repeats: int, lmcache_python: Path | None, progress: "_Steps", notes: list[str]
) -> tuple[list[Result], list[Measured]]:
    with RawDisk(place.folders, place.size, place.window(max(BLOCK_SIZES))) as disk:
        progress.say("writing random bytes")
        disk.fill(lambda _: None)
        found = sweep(disk, plan, progress.say)
        results = list(sweep_results(found))
        threads = recommended_threads(found, BLOCK_SIZES)
        for block_bytes in BLOCK_SIZES:
            windows = Windows(
                block_bytes=block_bytes, num_blocks=place.window(block_bytes) // block_bytes, num_windows=_WINDOWS
            )
            depths = {writes: candidate_depths(found, block_bytes, writes=writes) for writes in (False, True)}
            comparison = Comparison(windows=windows, depths=depths, repeats=repeats)
            tier_folders = [folder / f"tier-{block_bytes}" for folder in place.folders]
            with contextlib.ExitStack() as sides:
                progress.say(f"{format_size(block_bytes)} blocks: filling the tier")
                ours = sides.enter_context(TierSide(tier_folders, windows, threads))
                peers = []
                if lmcache_python is not None:
                    progress.say(f"{format_size(block_bytes)} blocks: trying LMCache's numbers of workers")
                    folder = place.folders[0] / f"lmcache-{block_bytes}"
                    choices = {_DEFAULT_WORKERS} if plan is _QUICK else {_DEFAULT_WORKERS, threads}
                    workers = _best_workers(lmcache_python, folder, windows, choices)
                    peers.append(sides.enter_context(LMCachePeer(lmcache_python, folder, windows, workers)))
                results += compare(ours, peers, comparison, progress.say)
            for folder in (*tier_folders, place.folders[0] / f"lmcache-{block_bytes}"):
                shutil.rmtree(folder, ignore_errors=True)
    if refusal := why_no_gds():
        notes.append(f"GPUDirect Storage was not measured: {refusal}")
    else:
        top = best(found, writes=False).way
        results += gds_results(place.folders[0], place.window(max(BLOCK_SIZES)), top.call_bytes, top.depth)
    return results, found


def _best_workers(python: Path, folder: Path, windows: Windows, choices: set[int]) -> int:
    """Of several: its default, or as many as our tier has threads: whichever moves a window there and back in less time."""
    if len(choices) == 1:
        return next(iter(choices))
    seconds: dict[int, float] = {}
    for workers in sorted(choices):
        with LMCachePeer(python, folder, windows, workers) as peer:
            seconds[workers] = min(peer.store(0) + peer.load(1) for _ in range(2))
        shutil.rmtree(folder)
    return min(seconds, key=lambda workers: seconds[workers])


@contextlib.contextmanager
def _scratch(paths: Sequence[Path]) -> Iterator[tuple[Path, ...]]:
    """A folder of this run in each path, removed in the end, also after Ctrl-C or SIGTERM."""
    with contextlib.ExitStack() as made:
        yield tuple(
            Path(made.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-perf-disk-", dir=path)))
            for path in paths
        )


class _Steps:
    """Progress: one step for each thing that is measured."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=total)

    def say(self, what: str) -> None:
        """A new step begins."""
        self._progress.update(self._task, advance=1, description=what)


@contextlib.contextmanager
def _progress(console: Console, plan: Sweep, repeats: int) -> Iterator[_Steps]:
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Steps(progress, 1 + plan.num_runs + len(BLOCK_SIZES) * (1 + 2 * repeats))
