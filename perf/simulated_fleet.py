"""Workers that take time but compute nothing: real block pools and a real router, on the clock of a trace.

A worker computes one prompt after the other, at a fixed speed, which falls a little with what its running requests hold (their
cache is read in each step); answers come at a fixed rate. What it holds, it tells the router a moment later, and how much it
has to do, every second. Everything happens in the order of simulated time, in one thread.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.eviction import EvictionOrder, LeafFirstLRU, Use
from dynamo.kvcache.hashing import HASH_VERSION, BlockKey, block_keys, chain_root
from dynamo.kvcache.hit_density import HitDensity
from dynamo.kvcache.pool import BlockPool
from dynamo.kvcache.retention import Retention
from dynamo.kvcache.reuse import ReuseTracker
from dynamo.perf.trace_log import TracedRequest
from dynamo.perf.trace_replay import TraceTime
from dynamo.router.config import RouterConfig
from dynamo.router.router import Booking, RouteQuery, Router
from dynamo.router.workers import LoadReport, WorkerCard
from dynamo.tiers.tier import SlotIds

__all__ = ["FleetSpeeds", "FleetTrace", "Outcome", "SimulatedFleet", "fleet_trace"]

Eviction = Literal["lru", "hit_density"]

_FINGERPRINT = b"a simulated model"
_EVENT_DELAY_S = 0.01
_REPORT_S = 1.0
_STEP_TOKENS = 2048
_MAX_RUNNING = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpeeds:
    """How fast a worker is.

    Attributes:
        prefill_tokens_per_s: of prompts, with nothing else running.
        output_tokens_per_s: of each answer.
        held_tokens_per_s: tokens of running requests whose keys and values a step reads in a second; 128 KiB each at 3 TB/s.
    """

    prefill_tokens_per_s: float = 10_000.0
    output_tokens_per_s: float = 40.0
    held_tokens_per_s: float = 24e6


@dataclass(frozen=True, slots=True)
class _Arrival:
    time_s: float
    tokens: memoryview
    keys: list[BlockKey]
    words: list[int]
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class FleetTrace:
    """A trace whose blocks have tokens, so that it is hashed and looked up as real prompts are.

    Attributes:
        arrivals: in order of time.
        num_unique: different blocks.
        num_blocks: of all requests.
    """

    arrivals: Sequence[_Arrival]
    num_unique: int
    num_blocks: int
    block_tokens: int

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.arrivals[-1].time_s - self.arrivals[0].time_s


def fleet_trace(requests: Sequence[TracedRequest], *, duration_s: float) -> FleetTrace:
    """Gives every block of the trace tokens of its own; times are stretched or shortened to `duration_s`.

    A trace names blocks only: the last one of a prompt counts as full.
    """
    block_tokens = requests[0].block_tokens
    root = chain_root(_FINGERPRINT, block_tokens)
    scale = duration_s / max(1e-9, requests[-1].time_s - requests[0].time_s)
    numbers: dict[int, int] = {}
    known: dict[int, BlockKey] = {}  # blocks are named with their prefix: each is hashed once
    arrivals: list[_Arrival] = []
    for request in requests:
        if not request.keys:
            continue
        ids = np.array([numbers.setdefault(key, len(numbers)) for key in request.keys], dtype=np.uint32)
        packed = np.repeat(ids, block_tokens)
        if not all(key in known for key in request.keys):
            known.update(zip(request.keys, block_keys(packed, block_tokens, root), strict=True))
        keys = [known[key] for key in request.keys]
        words = [int.from_bytes(key[:8], "little") for key in keys]
        time_s = (request.time_s - requests[0].time_s) * scale
        arrivals.append(_Arrival(time_s, packed.data.cast("B"), keys, words, request.num_output_tokens))
    return FleetTrace(arrivals, len(numbers), sum(len(one.keys) for one in arrivals), block_tokens)


@dataclass(slots=True)
class _Job:
    arrival: _Arrival
    booking: Booking
    predicted_tokens: int
    use: Use
    slots: SlotIds = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    num_found: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a trace under one mode.

    Attributes:
        found: leading blocks that each request found, int64 [number of requests], in the order of first tokens.
        first_token_s: time from arrival to first token of each, float64, likewise.
        prefill_tokens: computed by each worker.
        busy_s: time each worker computed prompts.
        elapsed_s: from the first arrival to the last end.
        predicted_tokens: prompt tokens the router expected to be found.
        route_cpu_s: of the router, all requests together.
    """

    found: npt.NDArray[np.int64]
    first_token_s: npt.NDArray[np.float64]
    prefill_tokens: list[int]
    busy_s: list[float]
    elapsed_s: float
    predicted_tokens: int
    route_s: float


class SimulatedFleet:
    """N workers, a router, and a clock. Runs one trace."""

    def __init__(
        self,
        trace: FleetTrace,
        num_workers: int,
        blocks_per_worker: int,
        config: RouterConfig,
        speeds: FleetSpeeds,
        *,
        eviction: Eviction = "hit_density",
        seed: int = 0,
    ) -> None:
        self.now_s = 0.0
        self.trace = trace
        self.speeds = speeds
        self.router = Router(config, clock=lambda: self.now_s, rng=random.Random(seed))
        self.found: list[int] = []
        self.first_token_s: list[float] = []
        self.num_unfinished = len(trace.arrivals)
        self._num_scheduled = 0
        self._due: list[tuple[float, int, _Step]] = []
        self._workers = [_Worker(self, f"worker-{n}", blocks_per_worker, eviction) for n in range(num_workers)]
        self._by_id = {worker.worker_id: worker for worker in self._workers}

    def after(self, delay_s: float, step: "_Step") -> None:
        """Schedules a step."""
        self._num_scheduled += 1
        heappush(self._due, (self.now_s + delay_s, self._num_scheduled, step))

    def run(self) -> Outcome:
        """Everything from the first arrival to the last end."""
        predicted = 0
        for worker in self._workers:
            worker.report()
        for number, arrival in enumerate(self.trace.arrivals):
            self._advance(arrival.time_s)
            self.now_s = arrival.time_s
            query = RouteQuery(tokens=arrival.tokens, request_id=str(number))
            decision, booking = self.router.route(query)
            predicted += decision.cached_tokens
            self._by_id[decision.worker_id].take(arrival, booking)
        while self.num_unfinished:
            self._advance(self._due[0][0])
        return Outcome(
            found=np.array(self.found, dtype=np.int64),
            first_token_s=np.array(self.first_token_s),
            prefill_tokens=[worker.prefill_tokens for worker in self._workers],
            busy_s=[worker.busy_s for worker in self._workers],
            elapsed_s=self.now_s,
            predicted_tokens=predicted,
            route_s=self.router.stats().total_s.total_s,
        )

    def _advance(self, until_s: float) -> None:
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, step = heappop(self._due)
            step()
