"""The real disk tier, and LMCache's back-end, on the same disk and in turn with the raw device at its best depths."""

import contextlib
import errno
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.random import default_rng

from dynamo.kvcache.config import format_size
from dynamo.kvcache.device_path import find_device_path
from dynamo.perf.disk_calls import Call, open_queue, run_calls, run_requests
from dynamo.perf.disk_raw import QUEUE_DEPTH
from dynamo.perf.harness import BenchmarkError, median, timed
from dynamo.perf.peer_process import PeerProcess
from dynamo.perf.report import Result
from dynamo.tiers.aio import RequestQueue
from dynamo.tiers.arena import map_rows
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.layout import BlockLayout

__all__ = ["Comparison", "LMCachePeer", "TierSide", "Windows", "compare"]

_FINGERPRINT = b"dynamo.perf disk"
_SPARE_BLOCKS = 16
_METRICS = {True: "write", False: "read"}  # by whether it writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The blocks that are moved: so many windows of so many blocks each. One call moves one window, in shuffled order."""

    block_bytes: int
    num_blocks: int
    num_windows: int

    @property
    def window_bytes(self) -> int:
        """Of one call."""
        return self.num_blocks * self.block_bytes


class TierSide:
    """A disk tier full of windows. Every byte that comes back is compared, off the clock."""

    def __init__(self, folders: Sequence[Path], windows: Windows, io_threads: int) -> None:
        """Opens the tier and writes all windows once, so that the file has its place on the disk."""
        layout = BlockLayout(num_layers=1, block_size=1, num_kv_heads=1, head_dim=windows.block_bytes // 2, itemsize=1)
        self.num_windows = windows.num_windows
        total_blocks = windows.num_windows * windows.num_blocks
        self._random = default_rng(1)
        self._source, self._target = (map_rows(layout, windows.num_blocks) for _ in range(2))
        for row in self._source:
            row[:] = np.frombuffer(self._random.bytes(row.size), dtype=np.uint8)
        self._target[:] = 0
        capacity_bytes = (total_blocks + _SPARE_BLOCKS) * layout.slot_bytes
        self._tier = DiskTier.open(folders, layout, capacity_bytes, _FINGERPRINT, io_threads=io_threads)
        self.name = f"disk tier ({self._tier.stats().path})"
        self._fds: list[int] = []
        # No two slots of a window are neighbours: the tier cannot merge them, and has to do with calls of one block.
        self._slots = [
            self._random.permutation(np.arange(window, total_blocks, windows.num_windows))
            for window in range(windows.num_windows)
        ]
        self._row_ids = [np.arange(windows.num_blocks) for _ in self._slots]
        try:
            self._fill(total_blocks)
            for window in range(windows.num_windows):
                self.store(window)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find_device_path(self, device: torch.device, *, keeps_in_host: bool) -> str:
        """How a cache, with or without a host tier, would get blocks from here to `device`, and why that way."""
        with contextlib.closing(DeviceTier(self._tier.layout, torch.uint8, 1, device)) as target:
            path = find_device_path(self._tier, target, keeps_in_host=keeps_in_host, num_rows=1)
            if path.staging:
                path.staging.close()
        return path.description

    def store(self, window: int) -> float:
        """Seconds to write a window anew, with its rows in another order."""
        row_ids = self._row_ids[window] = self._random.permutation(len(self._source)).astype(np.int64)
        outcomes = np.zeros(0, dtype=np.bool_)

        def write() -> None:
            nonlocal outcomes
            outcomes = self._tier.write(self._slots[window], self._source, row_ids)

        seconds = timed(write).wall_s
        if not outcomes.all():
            raise BenchmarkError(f"the disk tier did not take all blocks: {dict(self._tier.stats().faults)}")
        return seconds

    def load(self, window: int) -> float:
        """Seconds to read a window."""
        row_ids = np.arange(len(self._target))
        outcomes = np.zeros(0, dtype=np.bool_)

        def read() -> None:
            nonlocal outcomes
            outcomes = self._tier.read(self._slots[window], self._target, row_ids)

        seconds = timed(read).wall_s
        if not outcomes.all():
            raise BenchmarkError(f"the disk tier did not give all blocks: {dict(self._tier.stats().faults)}")
        for row, source in zip(self._target, self._row_ids[window].tolist(), strict=True):
            if not np.array_equal(row, self._source[source]):
                raise RuntimeError("the disk tier gave other bytes than it was given")
        return seconds

    def _fill(self, total_blocks: int) -> None:
        """Gives the file its place on the disk in one piece after the other, as the raw files have theirs."""
        for start in range(0, total_blocks, len(self._source)):
            slots = np.arange(start, min(start + len(self._source), total_blocks))
            if not self._tier.write(slots, self._source, slots - start).all():
                raise BenchmarkError(f"the disk tier did not take all blocks: {dict(self._tier.stats().faults)}")

    def calls(self, window: int, *, writes: bool, is_ascending: bool) -> list[Call]:
        """What `store` or `load` of a window moves, as plain calls of the tier's own files and memory.

        They write what the blocks hold already.

        Raises:
            BenchmarkError: the file system has no direct I/O.
        """
        if not self._fds:
            self._fds = [_open_direct(folder / "blocks.dat") for folder in self._tier.folders]
        rows, row_ids = (
            (self._source, self._row_ids[window]) if writes else (self._target, np.arange(len(self._target)))
        )
        slots, width = self._slots[window], rows.shape[1]
        order = np.argsort(slots) if is_ascending else np.arange(len(slots))
        memory = rows.reshape(-1).data
        places, numbers = np.divmod(slots[order], len(self._fds))
        return [
            (self._fds[number], [memory[row * width : (row + 1) * width]], place * width)
            for number, row, place in zip(numbers.tolist(), row_ids[order].tolist(), places.tolist(), strict=True)
        ]

    def close(self) -> None:
        """Closes the tier; whoever made the folders deletes the files."""
        while self._fds:
            os.close(self._fds.pop())
        self._tier.close()


class LMCachePeer:
    """LMCache's `fs_native` back-end with O_DIRECT in an interpreter of its own; see `lmcache_peer.py`."""

    def __init__(self, python: Path, folder: Path, windows: Windows, workers: int) -> None:
        script = Path(__file__).with_name("lmcache_peer.py")
        command: list[str | Path] = [
            *(python, "-P", script, f"--folder={folder}", f"--workers={workers}"),
            *(f"--blocks={windows.num_blocks}", f"--block-bytes={windows.block_bytes}"),
        ]
        folder.mkdir(parents=True)
        self._process = PeerProcess("LMCache", "lmcache", "--lmcache-python", command, {"LMCACHE_LOG_LEVEL": "ERROR"})
        self.name = f"LMCache {self._process.hello['lmcache']} (fs_native, O_DIRECT, {workers} workers)"
        try:
            self._ask("fill", windows.num_windows)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def store(self, window: int) -> float:
        """Seconds to store a window."""
        return self._ask("store", window)

    def load(self, window: int) -> float:
        """Seconds to load a window, whose bytes it has compared."""
        return self._ask("load", window)

    def close(self) -> None:
        """Ends its process."""
        self._process.close()

    def _ask(self, order: str, number: int) -> float:
        return float(self._process.ask({order: number})["seconds"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Who is measured beside whom.

    Attributes:
        depths: of the raw device, by direction (True: write). Each is tried with shuffled and with ascending places, and so
            are asynchronous requests; the highest median is the ceiling.
    """

    windows: Windows
    depths: dict[bool, list[int]]
    repeats: int


def compare(
    ours: TierSide, peers: Sequence[LMCachePeer], plan: Comparison, advance: Callable[[str], object]
) -> list[Result]:
    """Writes and reads windows with all sides and the raw device in turn; medians of rates, and of shares turn by turn.

    Raises:
        BenchmarkError: the file system has no direct I/O, or somebody did not move all.
    """
    sides: tuple[TierSide | LMCachePeer, ...] = (ours, *peers)
    rates, ceilings = _rates_in_turn(ours, sides, plan, advance)
    names = f"raw O_DIRECT ({ceilings[True]} writing; {ceilings[False]} reading)"
    case = f"{format_size(plan.windows.block_bytes)} blocks"
    results: list[Result] = []
    for writes, metric in _METRICS.items():
        ceiling = rates[writes][ceilings[writes]]
        for name, values in ({names: ceiling} | {side.name: rates[writes][side.name] for side in sides}).items():
            shares = [100 * value / top for value, top in zip(values, ceiling, strict=True)]
            for column, value, unit in ((metric, median(values), "GB/s"), (f"{metric} share", median(shares), "%")):
                results.append(
                    Result(case=case, subject=name, metric=column, value=value, unit=unit, samples=len(values))
                )
    return results


def _rates_in_turn(
    ours: TierSide, sides: Sequence["TierSide | LMCachePeer"], plan: Comparison, advance: Callable[[str], object]
) -> tuple[dict[bool, dict[str, list[float]]], dict[bool, str]]:
    """GB/s of all sides and of raw ways over our file by direction and name, one for each turn; and the fastest raw ways."""
    order = random.Random(3)
    rates: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    fastest: dict[bool, str] = {}
    with contextlib.ExitStack() as stack:
        queue = open_queue(QUEUE_DEPTH)
        if queue is not None:
            stack.callback(queue.close)
        for writes, metric in _METRICS.items():
            raw = _raw_runs(ours, plan.depths[writes], queue, writes=writes)
            runs = raw | {side.name: _side_run(side, plan.windows, writes=writes) for side in sides}
            for turn in range(plan.repeats):
                advance(f"{format_size(plan.windows.block_bytes)} blocks, {metric}, turn {turn + 1} of {plan.repeats}")
                for name in order.sample(list(runs), len(runs)):
                    rates[writes].setdefault(name, []).append(runs[name](turn))
            medians = {name: median(rates[writes][name]) for name in raw}
            fastest[writes] = max(medians, key=medians.__getitem__)
    return rates, fastest


def _raw_runs(
    ours: TierSide, depths: Sequence[int], queue: RequestQueue | None, *, writes: bool
) -> dict[str, Callable[[int], float]]:
    """Ways to move the tier's blocks without it, by name; each takes the number of the turn and gives GB/s."""
    runs: dict[str, Callable[[int], float]] = {}
    for order, is_ascending in (("shuffled", False), ("ascending", True)):
        for depth in depths:
            runs[f"{depth} threads, {order}"] = _raw_run(ours, depth, None, writes=writes, is_ascending=is_ascending)
        if queue is not None:
            name = f"{QUEUE_DEPTH} requests, {order}"
            runs[name] = _raw_run(ours, QUEUE_DEPTH, queue, writes=writes, is_ascending=is_ascending)
    return runs


def _raw_run(
    ours: TierSide, depth: int, queue: RequestQueue | None, *, writes: bool, is_ascending: bool
) -> Callable[[int], float]:
    def run(turn: int) -> float:
        calls = ours.calls(turn % ours.num_windows, writes=writes, is_ascending=is_ascending)
        if queue is None:
            return run_calls(calls, depth, writes=writes).gb_per_s
        return run_requests(queue, calls, depth, writes=writes).gb_per_s

    return run


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise BenchmarkError(
                f"the file system has no O_DIRECT to compare {path.name} with; give another --path"
            ) from error
        raise


def _side_run(side: TierSide | LMCachePeer, windows: Windows, *, writes: bool) -> Callable[[int], float]:
    move = side.store if writes else side.load
    return lambda turn: windows.window_bytes / move(turn % windows.num_windows) / 1e9
