"""A day of a router in minutes: a trace again and again, with workers that come, go, crash and are cleared.

Every repetition has new blocks, so that whatever is not forgotten shows. Workers are least-recently-used sets of blocks that
tell the router what they take and drop; requests of another front come and go as well, and now and then one's end is lost.
"""

import argparse
import os
import random
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console

from dynamo.kvcache.hashing import HASH_VERSION, chain_root
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.machine import machine_record
from dynamo.perf.option_checks import check_at_least_1
from dynamo.perf.report import Report, Result
from dynamo.perf.trace_log import TracedRequest, read_trace
from dynamo.router.chain import PrefixChain
from dynamo.router.config import RouterConfig
from dynamo.router.router import Booking, RouteQuery, Router
from dynamo.router.workers import LoadEvent, WorkerCard
from dynamo.serve.registration_files import MAX_WORKERS

__all__ = ["SUMMARY", "Checkpoint", "Soak", "add_arguments", "run"]

SUMMARY = "a million requests of a trace through a router whose workers come and go: memory over time, requests/s"

_BLOCK_TOKENS = 16  # of the router's blocks: what a block of the trace is worth does not matter here
_FINGERPRINT = b"a soaked model"
_ROOT = chain_root(_FINGERPRINT, _BLOCK_TOKENS).lo
_DAY_S = 86_400.0
_NUM_UNDER_WAY = 200  # requests at any time
_NUM_CHECKPOINTS = 12
_LOST_ENDS = 0.05  # of other fronts' requests
_CHANGES: Final = ("crash", "drain", "clear", "join", "join")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `perf soak`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a trace, as for `perf trace`")
    parser.add_argument("--requests", type=int, default=1_000_000, metavar="N", help="how many, over a simulated day")
    parser.add_argument("--workers", type=int, default=32, metavar="N", help="most at a time")
    parser.add_argument("--worker-blocks", type=int, default=4096, metavar="N", help="that each of them holds")
    parser.add_argument("--churn", type=int, default=1000, metavar="N", help="requests between changes of the fleet")


def run(options: argparse.Namespace, console: Console) -> Report:
    """Soaks a router and reports.

    Raises:
        BenchmarkError: an option or the trace makes no sense.
        OSError: the file cannot be read.
    """
    names = ("requests", "workers", "worker_blocks", "churn")
    check_at_least_1(**{name: getattr(options, name) for name in names})
    if options.workers > MAX_WORKERS:
        raise BenchmarkError(f"--workers must be from 1 to {MAX_WORKERS}, not {options.workers}")
    requests = [request for request in read_trace(options.file) if request.keys]
    if not requests:
        raise BenchmarkError("no request of the trace has a block")
    soak = Soak(requests, num_workers=options.workers, worker_blocks=options.worker_blocks, churn=options.churn)
    results: list[Result] = []
    points: list[Checkpoint] = []
    for point in soak.run(options.requests):
        points.append(point)
        results += _results(point)
        console.print(f"{point.num_requests:,} requests, {point.rss_bytes / 1e6:.1f} MB", markup=False, highlight=False)
    settled = points[len(points) // 4]  # by then every set of blocks is full
    growth = points[-1].rss_bytes / settled.rss_bytes - 1
    results.append(
        Result(case="from a quarter to the end", subject="process", metric="RSS", value=100 * growth, unit="%")
    )
    return Report(
        benchmark="soak",
        title=f"{options.requests:,} requests over a simulated day, up to {options.workers} workers, {soak.num_changes:,} "
        "joins, drains, crashes and clears",
        machine=machine_record(),
        parameters={
            "requests": options.requests,
            "workers": options.workers,
            "worker_blocks": options.worker_blocks,
            "churn": options.churn,
        },
        results=results,
        notes=[
            "entries: (worker, block) pairs in the index, those of departed workers that are not swept yet included",
            "requests/s: of one processor, simulated workers and events included; routing alone: its elapsed time",
            f"prefix hits {100 * soak.num_hits / soak.num_blocks:.1f} % of {soak.num_blocks:,} blocks",
        ],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The router at one moment.

    Attributes:
        num_requests: routed so far.
        num_entries: in the index, unswept ones included.
        num_predicted: blocks in predictions.
        num_held: blocks that the workers really hold.
        index_bytes: by the index's own account.
        rss_bytes: of the process.
        cpu_s: since the start.
        route_s: elapsed time of routing since the start.
    """

    num_requests: int
    num_workers: int
    num_entries: int
    num_predicted: int
    num_held: int
    num_bookings: int
    num_foreign: int
    num_sessions: int
    index_bytes: int
    rss_bytes: int
    cpu_s: float
    route_s: float


class _Worker:
    """A set of blocks that drops what was used longest ago, of a chain the last first."""

    def __init__(self, router: Router, worker_id: str, epoch: int, capacity: int) -> None:
        self.worker_id = worker_id
        self._index = router.index
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.slot = router.join(
            WorkerCard(
                worker_id=worker_id,
                epoch=epoch,
                model="soaked",
                fingerprint=_FINGERPRINT.hex(),
                hash_version=HASH_VERSION,
                block_size=_BLOCK_TOKENS,
                num_blocks={"device": capacity},
            )
        )

    def __len__(self) -> int:
        return len(self._blocks)

    def use(self, keys: Sequence[int]) -> int:
        """Takes a prompt's blocks in; returns how many leading ones were there."""
        blocks = self._blocks
        found = 0
        for key in keys:
            if key not in blocks:
                break
            found += 1
        for key in reversed(keys):
            blocks[key] = None
            blocks.move_to_end(key)
        dropped = [blocks.popitem(last=False)[0] for _ in range(len(blocks) - self._capacity)]
        if found < len(keys):
            self._index.stored(self.slot, "device", keys[found:], keys[found - 1] if found else None)
        if dropped:
            self._index.removed(self.slot, "device", dropped)
        return found

    def clear(self) -> None:
        """Drops everything."""
        self._blocks.clear()
        self._index.cleared(self.slot)


class Soak:
    """A router, its workers and its requests. Time passes with the requests.

    Attributes:
        router: the router.
        num_changes: of the fleet.
        num_blocks: of all prompts.
        num_hits: leading blocks found.
    """

    def __init__(
        self, requests: Sequence[TracedRequest], *, num_workers: int, worker_blocks: int, churn: int, seed: int = 0
    ) -> None:
        self._now_s = 0.0
        self._rng = random.Random(seed)
        self.router = Router(RouterConfig(front_id="me"), clock=lambda: self._now_s, rng=self._rng)
        self.num_changes = self.num_blocks = self.num_hits = 0
        numbers: dict[int, int] = {}
        self._chains = [
            np.array([numbers.setdefault(key, len(numbers)) for key in request.keys], dtype=np.uint32)
            for request in requests
        ]
        self._num_unique = len(numbers)
        self._num_workers, self._worker_blocks, self._churn = num_workers, worker_blocks, churn
        self._workers: dict[str, _Worker] = {}
        self._under_way: deque[Booking] = deque()
        self._foreign: deque[tuple[str, LoadEvent]] = deque()
        for _ in range(num_workers):
            self._join()

    def run(self, num_requests: int) -> Iterator[Checkpoint]:
        """Routes requests; stops at a dozen checkpoints, evenly spread."""
        begun_s = time.process_time()
        step = max(1, num_requests // _NUM_CHECKPOINTS)
        for number in range(num_requests):
            self._now_s = number * _DAY_S / num_requests
            self._request(number)
            if (number + 1) % self._churn == 0:
                self._change()
            if (number + 1) % step == 0:
                yield self._checkpoint(number + 1, time.process_time() - begun_s)

    def finish(self) -> None:
        """Ends all requests and lets all workers go."""
        for booking in self._under_way:
            booking.free()
        self._under_way.clear()
        for worker_id in list(self._workers):
            self._leave(worker_id)
        while self.router.index.sweep(self._now_s + _DAY_S, 1 << 20):
            pass

    def _request(self, number: int) -> None:
        repetition, place = divmod(number, len(self._chains))
        blocks = self._chains[place] + np.uint32(repetition * self._num_unique % (1 << 31))
        tokens = np.repeat(blocks, _BLOCK_TOKENS).data.cast("B")
        query = RouteQuery(tokens=tokens, request_id=str(number), session=str(number // 3))
        decision, booking = self.router.route(query)
        self._under_way.append(booking)
        keys = PrefixChain(_ROOT, tokens, _BLOCK_TOKENS).keys(len(blocks))
        found = self._workers[decision.worker_id].use(keys)
        booking.first_token(found * _BLOCK_TOKENS)
        self.num_blocks += len(keys)
        self.num_hits += found
        if len(self._under_way) > _NUM_UNDER_WAY:
            self._under_way.popleft().free()
        self._other_front(number, decision.worker_id)

    def _other_front(self, number: int, worker_id: str) -> None:
        """Another front sends a request to the same worker, and one of its earlier ones ends."""
        name = f"{number}"
        added = LoadEvent(kind="added", front_id="other", request_id=name, prefill_tokens=100, num_blocks=10)
        self.router.foreign_load(worker_id, added)
        if self._rng.random() >= _LOST_ENDS:
            self._foreign.append((worker_id, LoadEvent(kind="freed", front_id="other", request_id=name)))
        if len(self._foreign) > _NUM_UNDER_WAY:
            self.router.foreign_load(*self._foreign.popleft())

    def _change(self) -> None:
        self.num_changes += 1
        change = self._rng.choice(_CHANGES)
        if change == "join" or len(self._workers) <= max(1, self._num_workers // 2):
            if len(self._workers) < self._num_workers:
                self._join()
            return
        worker_id = self._rng.choice(list(self._workers))
        if change == "clear":
            self._workers[worker_id].clear()
        elif change == "drain":
            self.router.drain(worker_id)
            self._leave(worker_id)
        else:
            self._leave(worker_id)

    def _join(self) -> None:
        worker_id = next(name for n in range(self._num_workers) if (name := f"worker-{n}") not in self._workers)
        self._workers[worker_id] = _Worker(self.router, worker_id, self.num_changes + 1, self._worker_blocks)

    def _leave(self, worker_id: str) -> None:
        del self._workers[worker_id]
        self.router.leave(worker_id)

    def _checkpoint(self, num_requests: int, cpu_s: float) -> Checkpoint:
        stats = self.router.stats()
        return Checkpoint(
            num_requests=num_requests,
            num_workers=len(stats.workers),
            num_entries=stats.index.num_entries + stats.index.num_unswept,
            num_predicted=stats.index.num_predicted,
            num_held=sum(map(len, self._workers.values())),
            num_bookings=stats.num_bookings,
            num_foreign=sum(worker.num_foreign for worker in stats.workers),
            num_sessions=stats.num_sessions,
            index_bytes=stats.index.num_bytes,
            rss_bytes=_rss_bytes(),
            cpu_s=cpu_s,
            route_s=stats.total_s.total_s,
        )


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _results(point: Checkpoint) -> Iterator[Result]:
    for metric, value, unit in (
        ("RSS", point.rss_bytes / 1e6, "MB"),
        ("workers", point.num_workers, ""),
        ("entries", point.num_entries, ""),
        ("predicted", point.num_predicted, ""),
        ("index", point.index_bytes / 1e6, "MB"),
        ("bookings", point.num_bookings, ""),
        ("foreign", point.num_foreign, ""),
        ("sessions", point.num_sessions, ""),
        ("speed", point.num_requests / point.cpu_s, "requests/s"),
        ("routing", point.route_s / point.num_requests * 1e6, "us"),
    ):
        yield Result(
            case=f"{point.num_requests:,} requests", subject="router", metric=metric, value=float(value), unit=unit
        )
