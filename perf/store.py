"""How fast blocks move between the device pool and the tiers below, beside what the hardware gives.

Saves and loads go the public way: write pages, `commit`, `flush`; then drop the tiers above, `open`, `wait`. The device
pool is in CPU memory, so the ceilings are memcpy and the raw disk: direct I/O on a file of the same file system, with
calls of the size of one block and the number in flight that served best. Everything is measured in turn, several times.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.cache import TierName
from dynamo.kvcache.config import format_size
from dynamo.perf.disk_raw import QUEUE_DEPTH, RawDisk, Way
from dynamo.perf.harness import BenchmarkError, median, timed
from dynamo.perf.machine import machine_record
from dynamo.perf.option_checks import check_at_least_1, check_folder, checked_size
from dynamo.perf.report import Report, Result

__all__ = ["SHAPES", "SUMMARY", "Shape", "add_arguments", "run"]

SUMMARY = "GB/s of saving to and loading from host and disk, beside memcpy and raw O_DIRECT"

_DEPTHS = (1, 2, 4, 8, 16, 32)
_LARGE_CALL_BYTES = 2 << 20  # where blocks are smaller, runs of them may move in one call: then this is the ceiling
_COMMIT_BYTES = 16 << 20  # a prefill chunk's worth of KV; one commit of everything would overrun the offload queue
_TIMEOUT_S = 120.0
_SPARE_SLOTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's KV shape; named after it."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def spec(self) -> KVSpec:
        """The shape as a cache wants it."""
        return KVSpec(
            model=f"perf {self.name}",
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )


SHAPES = {
    "8b": Shape(name="8B-class model", num_layers=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16),
    "small": Shape(name="small model", num_layers=8, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16),
    "demo": Shape(name="demo model", num_layers=4, num_kv_heads=2, head_dim=32, dtype=torch.float32),
}
"""Blocks of 16 tokens of 2 MiB, 64 KiB and 32 KiB."""


@dataclass(frozen=True, slots=True)
class _Seconds:
    """Wall time of moving everything down and up, one entry for each repeat."""

    save: list[float]
    load: list[float]


class _Ceiling(Protocol):
    """What the hardware gives; `measure` adds one entry to `seconds`."""

    name: str
    seconds: _Seconds

    def measure(self) -> None: ...


class _MemoryCopy:
    """Copies the same bytes from memory to memory in a number of threads."""

    def __init__(self, num_bytes: int, threads: int) -> None:
        self.name = f"memcpy, threads: {threads}"
        self.seconds = _Seconds([], [])
        self._threads = threads
        # Filled, not empty: pages that were never touched are no memory yet.
        self._targets = np.array_split(np.full(num_bytes, 0x5A, dtype=np.uint8), threads)
        self._sources = np.array_split(np.full(num_bytes, 0xA5, dtype=np.uint8), threads)

    def measure(self) -> None:
        with ThreadPoolExecutor(self._threads) as pool:
            seconds = timed(lambda: list(pool.map(np.copyto, self._targets, self._sources))).wall_s
        self.seconds.save.append(seconds)
        self.seconds.load.append(seconds)


class _RawCalls:
    """Reads and writes the raw disk in calls of one size, one behind the other, at the depths that serve best here."""

    def __init__(self, raw: RawDisk, num_bytes: int, call_bytes: int) -> None:
        self.seconds = _Seconds([], [])
        self._raw = raw
        self._num_bytes = num_bytes
        ways = [Way(call_bytes=call_bytes, depth=depth, is_ascending=True) for depth in _DEPTHS]
        if raw.can_queue:
            ways.append(Way(call_bytes=call_bytes, depth=QUEUE_DEPTH, is_ascending=True, is_queued=True))
        self._write_way, self._read_way = (
            min(ways, key=lambda way: self._seconds(way, writes=writes)) for writes in (True, False)
        )
        names = "/".join(f"{way.depth}{' async' * way.is_queued}" for way in (self._write_way, self._read_way))
        self.name = f"raw O_DIRECT, {format_size(call_bytes)}, depth {names}"

    def measure(self) -> None:
        self.seconds.save.append(self._seconds(self._write_way, writes=True))
        self.seconds.load.append(self._seconds(self._read_way, writes=False))

    def _seconds(self, way: Way, *, writes: bool) -> float:
        return self._num_bytes / 1e9 / self._raw.run(way, writes=writes).gb_per_s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    workload = parser.add_argument_group("workload")
    workload.add_argument(
        "--shape", choices=SHAPES, action="append", help="shapes to measure, repeatable (default: all)"
    )
    workload.add_argument(
        "--size", default="256MiB", help="bytes of KV for each shape; memory needed is 3 times as much"
    )
    workload.add_argument("--repeats", type=int, default=5, help="runs of each; medians are printed")
    workload.add_argument("--threads", type=int, default=4, help="threads that read and write the disk tier's file")
    place = parser.add_argument_group("place")
    place.add_argument(
        "--path",
        metavar="DIR",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder on the disk to measure; twice --size is written there and removed",
    )


def run(options: argparse.Namespace, console: Console) -> Report:
    """Measures all shapes.

    Raises:
        BenchmarkError: there is too little space, or the file system has no direct I/O.
    """
    size = checked_size("--size", options.size)
    check_at_least_1(repeats=options.repeats, threads=options.threads)
    check_folder(options.path, 2 * size + (64 << 20))
    machine = machine_record()
    results: list[Result] = []
    for name in options.shape or SHAPES:
        shape = SHAPES[name]
        num_blocks = size // shape.spec.layout.slot_bytes
        if num_blocks < 2:
            raise BenchmarkError(
                f"--size {options.size} holds fewer than 2 blocks of {format_size(shape.spec.layout.slot_bytes)}"
            )
        with tempfile.TemporaryDirectory(prefix="dynamo-perf-", dir=options.path) as folder:
            bench = _ShapeBench(shape, num_blocks, Path(folder), options.repeats, options.threads, console)
            results += bench.run()
    return Report(
        benchmark="store",
        title=f"Saving and loading {format_size(size)} of KV",
        machine=machine,
        parameters={"size": size, "repeats": options.repeats, "threads": options.threads},
        results=results,
        notes=(
            "save: commit to flushed; load: open to wait; medians of wall time; 1 GB = 10^9 bytes",
            "share: of the best ceiling below it. Loads from disk check digests and leave the blocks in the host tier too",
            f"file system: {_file_system(options.path)}; a virtual disk's cache, if any, serves tier and ceiling alike",
        ),
    )


class _ShapeBench:
    """All measurements of one shape."""

    def __init__(
        self, shape: Shape, num_blocks: int, folder: Path, repeats: int, threads: int, console: Console
    ) -> None:
        self._shape = shape
        self._spec = shape.spec
        self._slot_bytes = self._spec.layout.slot_bytes
        self._num_blocks = num_blocks
        self._total_bytes = num_blocks * self._slot_bytes
        self._folder = folder
        self._repeats = repeats
        self._threads = threads
        self._console = console
        # One token more than the blocks hold: of a sequence, at least one token is never cached.
        self._tokens = np.arange(num_blocks * self._spec.block_size + 1, dtype=np.uint32)

    def run(self) -> Iterator[Result]:
        """Yields the results of both tiers and their ceilings."""
        memory = self._total_bytes + _SPARE_SLOTS * self._slot_bytes
        copies = [_MemoryCopy(self._total_bytes, threads) for threads in sorted({1, len(os.sched_getaffinity(0))})]
        with self._cache(host=memory, disk=None) as cache:
            self._say("the host tier and memcpy")
            yield from self._results("host tier", self._measure(cache, ("device",), copies), copies)
        del copies
        with RawDisk([self._folder], self._total_bytes, self._total_bytes, extra_files=0) as raw:
            self._say("raw O_DIRECT at several depths")
            raw.fill(lambda _: None)  # the first write also allocates
            disks = [
                _RawCalls(raw, self._total_bytes, call_bytes)
                for call_bytes in sorted({self._slot_bytes, min(_LARGE_CALL_BYTES, self._total_bytes)})
            ]
            with self._cache(host=memory, disk=f"{self._folder}:{memory}") as cache:
                self._say("the disk tier and raw O_DIRECT")
                name = f"disk tier ({cache.stats().tier('disk').path})"
                yield from self._results(name, self._measure(cache, ("device", "host"), disks), disks)

    @contextmanager
    def _cache(self, host: int, disk: str | None) -> Iterator[KVCache]:
        with KVCache(
            self._spec,
            device="cpu",
            device_blocks=self._num_blocks + _SPARE_SLOTS,
            host=host,
            disk=disk,
            load_timeout_s=_TIMEOUT_S,
            io_threads=self._threads,
        ) as cache:
            generator = torch.Generator().manual_seed(1)
            for index in range(self._spec.num_layers):
                for pages in cache.layer(index):
                    pages.uniform_(-1, 1, generator=generator)
            yield cache

    def _measure(self, cache: KVCache, dropped_tiers: tuple[TierName, ...], ceilings: Sequence[_Ceiling]) -> _Seconds:
        """Saves and loads everything, in turn with the ceilings, after one run that allocates and does not count."""
        seconds = _Seconds([], [])
        for turn in range(self._repeats + 1):
            cache.clear()
            save_s, written = self._save(cache)
            for tier in dropped_tiers:
                cache.clear(tier)
            load_s = self._load(cache, written)
            if turn:
                for ceiling in ceilings:
                    ceiling.measure()
                seconds.save.append(save_s)
                seconds.load.append(load_s)
        return seconds

    def _save(self, cache: KVCache) -> tuple[float, torch.Tensor]:
        """Returns the seconds from the first commit to the last block's arrival, and a sample of what was saved."""
        chunk = max(1, _COMMIT_BYTES // self._slot_bytes) * self._spec.block_size
        with cache.open(self._tokens) as sequence:
            sequence.wait()
            sample = _sample(cache, sequence.block_table)

            def save() -> None:
                for end in range(chunk, len(self._tokens) + chunk, chunk):
                    sequence.commit(min(end, len(self._tokens)))
                if not cache.flush(_TIMEOUT_S):
                    raise BenchmarkError(f"saving took longer than {_TIMEOUT_S:.0f} s; give less --size")

            seconds = timed(save).wall_s
        if dropped := cache.stats().dropped_blocks:
            raise BenchmarkError(
                f"blocks were dropped on their way down: {dict(dropped)}; the machine is too busy to measure"
            )
        return seconds, sample

    def _load(self, cache: KVCache, written: torch.Tensor) -> float:
        cache.layer(0)[0].zero_()
        sequence = None

        def load() -> None:
            nonlocal sequence
            sequence = cache.open(self._tokens)
            sequence.wait()

        seconds = timed(load).wall_s
        assert sequence is not None
        with sequence:
            expected = self._num_blocks * self._spec.block_size
            if sequence.num_cached_tokens != expected:
                raise BenchmarkError(f"{sequence.num_cached_tokens} of {expected} tokens came back: {cache.stats()}")
            if not torch.equal(_sample(cache, sequence.block_table)[:-1], written[:-1]):
                raise RuntimeError("loaded blocks differ from saved ones")
        return seconds

    def _results(self, tier: str, seconds: _Seconds, ceilings: Sequence[_Ceiling]) -> Iterator[Result]:
        case = f"{format_size(self._slot_bytes)} blocks ({self._shape.name})"
        rows = {tier: self._rates(seconds)} | {ceiling.name: self._rates(ceiling.seconds) for ceiling in ceilings}
        for subject, rates in rows.items():
            for metric, rate in rates.items():
                yield Result(
                    case=case, subject=subject, metric=metric, value=rate, unit="GB/s", samples=len(seconds.save)
                )
                if subject == tier:
                    best = max(rows[ceiling.name][metric] for ceiling in ceilings)
                    yield Result(case=case, subject=tier, metric=f"{metric} share", value=100 * rate / best, unit="%")

    def _rates(self, seconds: _Seconds) -> dict[str, float]:
        """GB/s by metric."""
        values = (("save", seconds.save), ("load", seconds.load))
        return {metric: self._total_bytes / median(each) / 1e9 for metric, each in values}

    def _say(self, what: str) -> None:
        self._console.print(f"{format_size(self._slot_bytes)} blocks: {what} ...", style="dim")


def _sample(cache: KVCache, block_table: npt.NDArray[np.int32]) -> torch.Tensor:
    """First token's K of layer 0 of every block: enough to tell blocks apart and lost writes from good ones."""
    keys, _ = cache.layer(0)
    return keys[torch.from_numpy(block_table.astype(np.int64)), 0]


def _file_system(folder: Path) -> str:
    """Type of the file system `folder` lies on."""
    target = str(folder.resolve())
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(m[1]), m[2]) for m in mounts if target == m[1] or target.startswith(m[1].rstrip("/") + "/")]
    return max(above)[1] if above else "unknown"
