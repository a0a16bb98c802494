"""What-if: a recorded trace of requests through tiers of several sizes, with each policy beside the best possible one.

Reads Mooncake's trace format and the key log that a server records, plain or gzipped. A *prefix hit* is a block that the tier
holds together with all blocks before it; the hit rate is of all blocks of all requests. Requests are replayed one after the
other, each ending before the next begins. Policies learn as they go: they know nothing of the trace beforehand. Only
"Belady, knows the future" does: see `trace_replay.belady_hits` for what it bounds.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dynamo.kvcache.admission import Adaptive, AdmissionPolicy, AdmitAlways, SecondSighting
from dynamo.kvcache.eviction import EvictionOrder, LeafFirstLRU
from dynamo.kvcache.hit_density import HitDensity
from dynamo.kvcache.s3_fifo import S3Fifo
from dynamo.perf import trace_plot
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.machine import machine_record
from dynamo.perf.report import Report, Result
from dynamo.perf.trace_chains import Chains, TableHistory, prepare
from dynamo.perf.trace_log import read_trace
from dynamo.perf.trace_replay import MakeAdmission, MakeOrder, Replay, belady_hits, replay

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "replays a request trace through tier sizes and policies: hit rates, bytes written, prefill saved"

_DAY_S = 86400.0
_UNPROVEN_COSTS = (0.02, 0.5, 8.0)  # of a block on its first sighting, in hits: the default, and what spares flash


@dataclass(frozen=True, slots=True)
class _Policy:
    subject: str
    make_order: MakeOrder
    make_admission: MakeAdmission


def _lru(history: TableHistory) -> EvictionOrder:
    return LeafFirstLRU()


def _s3_fifo(history: TableHistory) -> EvictionOrder:
    return S3Fifo()


def _always(history: TableHistory, orders: Sequence[EvictionOrder]) -> AdmissionPolicy:
    return AdmitAlways()


def _second(history: TableHistory, orders: Sequence[EvictionOrder]) -> AdmissionPolicy:
    return SecondSighting()


def _adaptive(unproven_cost: float) -> MakeAdmission:
    def make(history: TableHistory, orders: Sequence[EvictionOrder]) -> AdmissionPolicy:
        def price(tier: str) -> float:
            order = orders[int(tier)]
            return order.price if isinstance(order, HitDensity) else 0.0

        return Adaptive(history, price, unproven_cost=unproven_cost)

    return make


_EVICTION = (
    _Policy("leaf-first LRU", _lru, _always),
    _Policy("S3-FIFO", _s3_fifo, _always),
    _Policy("hit density (default)", HitDensity, _always),
)
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
    parser.add_argument("--block-bytes", type=int, help="default: 128 KiB for each token, an 8B model with GQA in bf16")
    parser.add_argument("--prefill-tokens-per-s", type=float, default=10_000, help="speed of computing")
    parser.add_argument("--host-gb-per-s", type=float, default=20, help="speed of loading from host memory, 1e9 bytes")
    parser.add_argument(
        "--disk-gb-per-s", type=float, default=3, help="speed of reading and of writing the disk, 1e9 bytes"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw hit rates and writes as a PNG")


def run(options: argparse.Namespace, console: Console) -> Report:
    """Replays the trace and reports.

    Raises:
        BenchmarkError: the trace or an option makes no sense.
        OSError: the file cannot be read.
    """
    for name in ("prefill_tokens_per_s", "host_gb_per_s", "disk_gb_per_s"):
        if getattr(options, name) <= 0:
            raise BenchmarkError(f"--{name.replace('_', '-')} must be more than 0, not {getattr(options, name)}")
    if not all(0 < size <= 100 for size in options.sizes) or options.disk_times < 0:
        raise BenchmarkError(
            "--sizes are per cent of the trace's blocks, above 0 and up to 100; --disk-times is 0 or more"
        )
    begun, begun_cpu = time.perf_counter(), time.process_time()
    chains = prepare(read_trace(options.file))
    if not chains.num_references:
        raise BenchmarkError("no request of the trace has a block")
    what_if = _WhatIf(chains, options)
    results: list[Result] = []
    for size in options.sizes:
        results += what_if.one_tier(size)
        console.print(f"{size:g} %: one tier done, {time.perf_counter() - begun:.0f} s", markup=False, highlight=False)
    for size in options.sizes:
        results += what_if.admission(size)
        console.print(f"{size:g} %: admission done, {time.perf_counter() - begun:.0f} s", markup=False, highlight=False)
    for size in options.sizes if options.disk_times else ():
        results += what_if.two_tiers(size)
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
        notes=what_if.notes(time.perf_counter() - begun, time.process_time() - begun_cpu),
    )
    if options.plot is not None:
        reason = trace_plot.draw(report, options.plot)
        console.print(reason or f"drawn to {options.plot}", markup=False, highlight=False)
    return report


class _WhatIf:
    """One trace with what its blocks cost."""

    def __init__(self, chains: Chains, options: argparse.Namespace) -> None:
        self._chains = chains
        self._block_tokens = chains.requests[0].request.block_tokens
        self.block_bytes: int = options.block_bytes or self._block_tokens * (128 << 10)
        self._disk_times: float = options.disk_times
        self._compute_s = self._block_tokens / options.prefill_tokens_per_s
        self._host_s = self.block_bytes / options.host_gb_per_s / 1e9
        self._disk_s = self.block_bytes / options.disk_gb_per_s / 1e9

    def one_tier(self, size: float) -> Iterator[Result]:
        """Eviction: each policy, and the bound."""
        capacity = self._blocks(size)
        case = f"{size:g} %, {capacity:,} blocks"
        for policy in _EVICTION:
            begun = time.thread_time()
            done = replay(self._chains, [capacity], policy.make_order, policy.make_admission)
            cpu_s = time.thread_time() - begun
            if policy.make_order is HitDensity:
                cpu_s += self._chains.tracker_cpu_s
            yield from self._results(case, policy.subject, done, (self._host_s,))
            yield Result(
                case=case,
                subject=policy.subject,
                metric="CPU",
                value=cpu_s / self._chains.num_references * 1e6,
                unit="us/block",
            )
        yield self._rate(case, _BOUND, "prefix hits", belady_hits(self._chains, capacity))

    def admission(self, size: float) -> Iterator[Result]:
        """What is written to one disk tier under hit density, for what hit rate."""
        capacity = self._blocks(size)
        policies: list[tuple[str, MakeAdmission]] = [("admit always", _always), ("second sighting", _second)]
        policies += [(f"adaptive, unproven cost {cost:g}", _adaptive(cost)) for cost in _UNPROVEN_COSTS]
        for subject, make_admission in policies:
            done = replay(self._chains, [capacity], HitDensity, make_admission)
            yield from self._results(f"writing, {size:g} %", subject, done, (self._disk_s,))

    def two_tiers(self, size: float) -> Iterator[Result]:
        """A host tier over a disk tier."""
        host = self._blocks(size)
        disk = min(round(host * self._disk_times), self._chains.num_unique)
        case = f"host {size:g} %, disk {disk / self._chains.num_unique * 100:.3g} %"
        for subject, make_order, make_admission in (
            ("leaf-first LRU, always", _lru, _always),
            ("hit density, adaptive", HitDensity, _adaptive(_UNPROVEN_COSTS[0])),
        ):
            done = replay(self._chains, [host, disk], make_order, make_admission)
            yield from self._results(case, subject, done, (self._host_s, self._disk_s))

    def notes(self, wall_s: float, cpu_s: float) -> list[str]:
        """What a reader must know."""
        references = self._chains.num_references
        return [
            f"prefill saved: {self._compute_s * 1e3:.3g} ms for each block that need not be computed, less "
            f"{self._host_s * 1e3:.3g} ms to load it from host memory or {self._disk_s * 1e3:.3g} ms from disk; summed over "
            "the trace, which is what first tokens come earlier",
            f"CPU: the whole replay; hit density with the tracker, "
            f"{self._chains.tracker_cpu_s / references * 1e6:.2f} us/block, which all tiers share",
            f"{wall_s:.1f} s, {cpu_s:.1f} s of one processor, for everything shown",
        ]

    def _blocks(self, size: float) -> int:
        return max(1, int(self._chains.num_unique * size / 100))

    def _results(self, case: str, subject: str, done: Replay, load_s: Sequence[float]) -> Iterator[Result]:
        yield self._rate(case, subject, "prefix hits", sum(done.hits))
        if len(done.hits) > 1:
            yield self._rate(case, subject, "from host", done.hits[0])
            yield self._rate(case, subject, "from disk", done.hits[1])
        saved_s = sum(hits * max(0.0, self._compute_s - cost) for hits, cost in zip(done.hits, load_s, strict=True))
        yield Result(case=case, subject=subject, metric="prefill saved", value=saved_s, unit="s")
        written = done.written[-1] * self.block_bytes
        days = max(self._chains.duration_s, 1e-3) / _DAY_S
        yield Result(case=case, subject=subject, metric="written", value=written / days / 1e12, unit="TB/day")

    def _rate(self, case: str, subject: str, metric: str, hits: int) -> Result:
        share = hits / self._chains.num_references
        return Result(case=case, subject=subject, metric=metric, value=100 * share, unit="%")
