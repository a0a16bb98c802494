"""What-if: a recorded trace of requests through tiers of several sizes, with each policy beside the best possible one.

Reads Mooncake's trace format and the key log that a server records, plain or gzipped. A *prefix hit* is a block that the tier
holds together with all blocks before it; the hit rate is of all blocks of all requests. Requests are replayed one after the
other, each ending before the next begins, through the pool and the policies that a cache runs. Policies learn as they go: they
know nothing of the trace beforehand. Only "Belady, knows the future" does: see `trace_belady` for what it bounds.

With `--workers` it is not policies that are compared, but ways to choose among several workers: see `trace_workers`.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from dynamo.kvcache.admission import Adaptive, AdmissionPolicy, AdmitAlways, SecondSighting
from dynamo.kvcache.config import parse_size
from dynamo.kvcache.errors import CacheConfigError
from dynamo.kvcache.eviction import EvictionOrder, LeafFirstLRU
from dynamo.kvcache.hit_density import HitDensity
from dynamo.kvcache.retention import Retention
from dynamo.kvcache.reuse import ReuseTracker
from dynamo.kvcache.s3_fifo import S3Fifo
from dynamo.perf import trace_plot, trace_workers
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.machine import machine_record
from dynamo.perf.option_checks import check_above_0
from dynamo.perf.report import Report, Result
from dynamo.perf.trace_belady import Belady
from dynamo.perf.trace_chains import Chains, prepare
from dynamo.perf.trace_log import read_trace
from dynamo.perf.trace_parallel import replay_all
from dynamo.perf.trace_replay import MakeAdmission, MakeOrder, Replay, hits_by_tier, replay

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "replays a request trace through tier sizes and policies: hit rates, bytes written, prefill saved"

_DAY_S = 86400.0
_UNPROVEN_COSTS = (0.02, 0.5, 8.0)  # of a block on its first sighting, in hits: the default, and what spares flash


@dataclass(frozen=True, slots=True)
class _Policy:
    subject: str
    make_order: MakeOrder
    make_admission: MakeAdmission
    is_tracked: bool = True  # takes uses apart as the tracker tells; LRU takes them whole


def _lru(tracker: ReuseTracker) -> EvictionOrder:
    return Retention(LeafFirstLRU)


def _s3_fifo(tracker: ReuseTracker) -> EvictionOrder:
    return Retention(S3Fifo)


def _always(tracker: ReuseTracker, order: EvictionOrder) -> AdmissionPolicy:
    return AdmitAlways()


def _second(tracker: ReuseTracker, order: EvictionOrder) -> AdmissionPolicy:
    return SecondSighting()


def _adaptive(unproven_cost: float) -> MakeAdmission:
    def make(tracker: ReuseTracker, order: EvictionOrder) -> AdmissionPolicy:
        assert isinstance(order, HitDensity), "the price of a slot is known to hit density alone"
        return Adaptive(tracker, lambda tier, now_s: order.price(now_s), unproven_cost=unproven_cost)

    return make


_LRU = _Policy("leaf-first LRU", _lru, _always, is_tracked=False)
_S3_FIFO = _Policy("S3-FIFO", _s3_fifo, _always)
_DENSITY = _Policy("hit density (default)", HitDensity, _always)
_SECOND = _Policy("second sighting", HitDensity, _second)
_ADAPTIVE = tuple(_Policy(f"adaptive, unproven cost {cost:g}", HitDensity, _adaptive(cost)) for cost in _UNPROVEN_COSTS)
_PAIRS = (("leaf-first LRU, always", _LRU, _LRU), ("hit density, adaptive", _DENSITY, _ADAPTIVE[0]))  # host and disk
_BOUND = "Belady, knows the future"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `perf trace`."""
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="JSONL, plain or gzipped: Mooncake's format or a key log"
    )
    parser.add_argument(
        "--sizes",
        type=float,
        nargs="+",
        default=[1, 2, 5, 10, 25],
        metavar="P",
        help="per cent of the different blocks",
    )
    parser.add_argument("--disk-times", type=float, default=10, metavar="N", help="disk tier of N times the host tier")
    parser.add_argument(
        "--block-bytes",
        type=_size,
        default=argparse.SUPPRESS,
        metavar="SIZE",
        help="of a block, such as 2MiB (default: 128 KiB for each token, an 8B model with GQA in bf16)",
    )
    parser.add_argument("--prefill-tokens-per-s", type=float, default=10_000, help="speed of computing")
    parser.add_argument("--host-gb-per-s", type=float, default=20, help="speed of loading from host memory, 1e9 bytes")
    parser.add_argument(
        "--disk-gb-per-s", type=float, default=3, help="speed of reading and of writing the disk, 1e9 bytes"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw hit rates and writes as a PNG")
    trace_workers.add_arguments(parser.add_argument_group("several workers"))


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except CacheConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not size:
        raise argparse.ArgumentTypeError("a block has at least one byte")
    return size


def run(options: argparse.Namespace, console: Console) -> Report:
    """Replays the trace and reports.

    Raises:
        BenchmarkError: the trace or an option makes no sense.
        OSError: the file cannot be read.
    """
    check_above_0(
        prefill_tokens_per_s=options.prefill_tokens_per_s,
        host_gb_per_s=options.host_gb_per_s,
        disk_gb_per_s=options.disk_gb_per_s,
    )
    if not all(0 < size <= 100 for size in options.sizes) or not 0 <= options.disk_times < math.inf:
        raise BenchmarkError(
            "--sizes are per cent of the trace's blocks, above 0 and up to 100; --disk-times is 0 or more"
        )
    if options.plot is not None and not options.plot.parent.is_dir():
        raise BenchmarkError(f"--plot {options.plot}: there is no folder {options.plot.parent}; make it")
    if options.plot is not None and options.plot.is_dir():
        raise BenchmarkError(f"--plot {options.plot} is a folder; give the path of a file")
    if "workers" in options:
        trace_workers.check(options)
        if options.plot is not None:
            raise BenchmarkError("--plot draws policies, and --workers compares none: leave one of them out")
        return trace_workers.run(read_trace(options.file), options, console)
    begun = time.perf_counter()
    chains = prepare(read_trace(options.file))
    if not chains.num_references:
        raise BenchmarkError("no request of the trace has a block")
    what_if = _WhatIf(chains, options)
    what_if.replay_all()
    console.print(f"replays: done, {time.perf_counter() - begun:.0f} s", markup=False, highlight=False)
    results: list[Result] = []
    for tables in (what_if.one_tier, what_if.admission, what_if.two_tiers):
        for size in options.sizes:
            results += tables(size)
    report = Report(
        benchmark="trace",
        title=f"{len(chains.requests):,} requests, {chains.num_references:,} blocks, {chains.num_unique:,} different ones",
        machine=machine_record(),
        parameters={
            "sizes": " ".join(f"{size:g}" for size in options.sizes),
            "disk_times": options.disk_times,
            "block_bytes": what_if.block_bytes,
            "prefill_tokens_per_s": options.prefill_tokens_per_s,
            "host_gb_per_s": options.host_gb_per_s,
            "disk_gb_per_s": options.disk_gb_per_s,
        },
        results=results,
        notes=what_if.notes(time.perf_counter() - begun),
    )
    if options.plot is not None:
        reason = trace_plot.draw(report, options.plot)
        console.print(reason or f"drawn to {options.plot}", markup=False, highlight=False)
    return report


def _replay(chains: Chains, policy: _Policy, capacity: int) -> Replay:
    return replay(chains, capacity, policy.make_order, policy.make_admission, is_tracked=policy.is_tracked)


class _WhatIf:
    """One trace with what its blocks cost."""

    def __init__(self, chains: Chains, options: argparse.Namespace) -> None:
        self._chains = chains
        self._belady = Belady(chains)
        self._sizes: Sequence[float] = options.sizes
        self._replays: dict[tuple[_Policy, int], Replay] = {}  # tiers of different tables may be the same
        self.block_bytes: int = getattr(options, "block_bytes", 0) or chains.block_tokens * (128 << 10)
        self._disk_times: float = options.disk_times
        self._compute_s = chains.block_tokens / options.prefill_tokens_per_s
        self._host_s = self.block_bytes / options.host_gb_per_s / 1e9
        self._disk_s = self.block_bytes / options.disk_gb_per_s / 1e9

    def replay_all(self) -> None:
        """Replays all that the tables show. Before them."""
        wanted: dict[tuple[_Policy, int], None] = {}
        for size in self._sizes:
            capacity = self._blocks(size)
            wanted |= dict.fromkeys((policy, capacity) for policy in (_LRU, _S3_FIFO, _DENSITY, _SECOND, *_ADAPTIVE))
            if self._disk_times:
                wanted |= dict.fromkeys((below, self._disk_blocks(capacity)) for _, _, below in _PAIRS)
        # The longest first, so that no core is left with one while the others have nothing to do.
        cases = sorted(wanted, key=lambda case: case[0] is _LRU)
        tasks = [partial(_replay, self._chains, policy, capacity) for policy, capacity in cases]
        self._replays = dict(zip(cases, replay_all(tasks), strict=True))

    def one_tier(self, size: float) -> Iterator[Result]:
        """Eviction: each policy, and the bound."""
        capacity = self._blocks(size)
        case = f"{size:g} %, {capacity:,} blocks"
        for policy in (_LRU, _S3_FIFO, _DENSITY):
            done = self._replays[policy, capacity]
            yield from self._results(case, policy.subject, [done], [self._host_s])
            cpu_s = done.cpu_s + (self._chains.tracker_cpu_s if policy.is_tracked else 0.0)
            cpu_us = cpu_s / self._chains.num_references * 1e6
            yield Result(case=case, subject=policy.subject, metric="CPU", value=cpu_us, unit="us/block")
        yield self._rate(case, _BOUND, "prefix hits", self._belady.hits(capacity))

    def admission(self, size: float) -> Iterator[Result]:
        """What is written to one disk tier under hit density, for what hit rate."""
        capacity = self._blocks(size)
        for subject, policy in (
            ("admit always", _DENSITY),
            *((policy.subject, policy) for policy in (_SECOND, *_ADAPTIVE)),
        ):
            done = self._replays[policy, capacity]
            yield from self._results(f"writing, {size:g} %", subject, [done], [self._disk_s])

    def two_tiers(self, size: float) -> Iterator[Result]:
        """A host tier over a disk tier."""
        if not self._disk_times:
            return
        host = self._blocks(size)
        disk = self._disk_blocks(host)
        case = f"host {size:g} %, disk {disk / self._chains.num_unique * 100:.3g} %"
        for subject, above, below in _PAIRS:
            tiers = [self._replays[above, host], self._replays[below, disk]]
            yield from self._results(case, subject, tiers, [self._host_s, self._disk_s])

    def notes(self, wall_s: float) -> list[str]:
        """What a reader must know."""
        references = self._chains.num_references
        return [
            f"TTFT saved, mean of all requests: {self._compute_s * 1e3:.3g} ms for each block that need not be computed, "
            f"less {self._host_s * 1e3:.3g} ms to load it from host memory or {self._disk_s * 1e3:.3g} ms from disk",
            f"CPU: of the whole pool, per block of a request; but for LRU with the tracker, "
            f"{self._chains.tracker_cpu_s / references * 1e6:.2f} us/block, which all tiers share",
            f"{wall_s:.1f} s for the {len(self._replays)} replays and all the rest",
        ]

    def _blocks(self, size: float) -> int:
        return max(1, int(self._chains.num_unique * size / 100))

    def _disk_blocks(self, host: int) -> int:
        return max(1, min(round(host * self._disk_times), self._chains.num_unique))

    def _results(self, case: str, subject: str, tiers: Sequence[Replay], load_s: Sequence[float]) -> Iterator[Result]:
        hits = hits_by_tier(tiers)
        yield self._rate(case, subject, "prefix hits", sum(hits))
        if len(hits) > 1:
            yield self._rate(case, subject, "from host", hits[0])
            yield self._rate(case, subject, "from disk", hits[1])
        saved_s = sum(count * max(0.0, self._compute_s - cost) for count, cost in zip(hits, load_s, strict=True))
        saved_ms = saved_s / len(self._chains.requests) * 1e3
        yield Result(case=case, subject=subject, metric="TTFT saved", value=saved_ms, unit="ms/request")
        written = tiers[-1].num_written * self.block_bytes
        days = max(self._chains.duration_s, 1e-3) / _DAY_S
        yield Result(case=case, subject=subject, metric="written", value=written / days / 1e12, unit="TB/day")

    def _rate(self, case: str, subject: str, metric: str, hits: int) -> Result:
        share = hits / self._chains.num_references
        return Result(case=case, subject=subject, metric=metric, value=100 * share, unit="%")
