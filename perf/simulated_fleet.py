"""Workers that take time but compute nothing: real block pools and a real router, on the clock of a trace.

A worker computes one prompt after the other, at a speed that falls a little with what its running requests hold, since every
step reads that; answers likewise. It tells the router a moment later what it holds, and every second how much it has to do.
Everything happens in the order of simulated time, in one thread.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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

__all__ = ["Arrival", "Eviction", "FleetSpeeds", "FleetTrace", "Outcome", "SimulatedFleet", "fleet_trace"]

Eviction = Literal["lru", "hit_density"]

_FINGERPRINT = b"a simulated model"
_EVENT_DELAY_S = 0.01
_REPORT_S = 1.0
_STEP_TOKENS = 2048
_MAX_RUNNING = 256
_NO_SLOTS: SlotIds = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpeeds:
    """How fast a worker is.

    Attributes:
        prefill_tokens_per_s: of prompts, with nothing else running.
        output_tokens_per_s: of each answer, with nothing else running.
        held_tokens_per_s: tokens of running requests whose keys and values can be read in a second, as each step does: 128 KiB
            each at 3 TB/s.
    """

    prefill_tokens_per_s: float = 10_000.0
    output_tokens_per_s: float = 40.0
    held_tokens_per_s: float = 24e6


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the trace.

    Attributes:
        tokens: of its blocks, all full, little-endian u32.
        words: the router's halves of `keys`.
    """

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

    arrivals: Sequence[Arrival]
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
    arrivals: list[Arrival] = []
    for request in requests:
        if not request.keys:
            continue
        ids = np.array([numbers.setdefault(key, len(numbers)) for key in request.keys], dtype=np.uint32)
        packed = np.repeat(ids, block_tokens)
        if not all(key in known for key in request.keys):
            known.update(zip(request.keys, block_keys(packed, block_tokens, root), strict=True))
        keys = [known[key] for key in request.keys]
        time_s = (request.time_s - requests[0].time_s) * scale
        arrivals.append(Arrival(time_s, packed.data.cast("B"), keys, _words(keys), request.num_output_tokens))
    return FleetTrace(arrivals, len(numbers), sum(len(one.keys) for one in arrivals), block_tokens)


_Step = Callable[[], object]


@dataclass(slots=True)
class _Job:
    """A request at a worker. It holds `slots` from when its prompt is begun."""

    arrival: Arrival
    booking: Booking
    slots: SlotIds
    num_found: int = 0
    use: Use | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a trace.

    Attributes:
        found: leading blocks that each request found, int64 [number of requests], in the order of first tokens.
        first_token_s: time from arrival to first token of each, float64, in the same order.
        step_s: time from token to token of each answer, likewise.
        prefill_tokens: computed by each worker.
        busy_s: time that each worker was computing prompts.
        elapsed_s: from the first arrival to the last end.
        predicted_tokens: prompt tokens that the router expected to be found.
        route_s: elapsed time of the router itself, all requests together.
    """

    found: npt.NDArray[np.int64]
    first_token_s: npt.NDArray[np.float64]
    step_s: npt.NDArray[np.float64]
    prefill_tokens: Sequence[int]
    busy_s: Sequence[float]
    elapsed_s: float
    predicted_tokens: int
    route_s: float


class _Worker:
    """One simulated worker."""

    def __init__(self, fleet: "SimulatedFleet", worker_id: str, num_blocks: int, eviction: Eviction) -> None:
        self.worker_id = worker_id
        self.prefill_tokens = 0
        self.busy_s = 0.0
        self._fleet = fleet
        self._block_tokens = fleet.trace.block_tokens
        self._tracker = ReuseTracker()
        order: EvictionOrder = Retention(LeafFirstLRU) if eviction == "lru" else HitDensity(self._tracker)
        self._order = TraceTime(order)
        self._pool = BlockPool(num_blocks, self._order)
        self._waiting: deque[_Job] = deque()
        self._waiting_tokens = 0
        self._computing: _Job | None = None
        self._num_running = self._held_tokens = 0
        self._slot = fleet.router.join(
            WorkerCard(
                worker_id=worker_id,
                epoch=1,
                model="simulated",
                fingerprint=_FINGERPRINT.hex(),
                hash_version=HASH_VERSION,
                block_size=self._block_tokens,
                num_blocks={"device": num_blocks},
                max_running=_MAX_RUNNING,
            )
        )

    def take(self, arrival: Arrival, booking: Booking) -> None:
        """A request was sent here."""
        self._waiting.append(_Job(arrival, booking, _NO_SLOTS))
        self._waiting_tokens += len(arrival.keys) * self._block_tokens
        self._begin()

    def report(self) -> None:
        """Says how it is, and does so again in a second while anything is left to do."""
        report = LoadReport(
            num_running=self._num_running + (self._computing is not None),
            num_waiting=len(self._waiting),
            prefill_tokens_waiting=self._waiting_tokens,
            prefill_tokens_per_s=self._fleet.speeds.prefill_tokens_per_s,
        )
        self._fleet.router.report(self.worker_id, report)
        if self._fleet.num_unfinished:
            self._fleet.after(_REPORT_S, self.report)

    def _begin(self) -> None:
        """Begins the next prompt, if none is under way and the pool has room for it."""
        if self._computing is not None or not self._waiting:
            return
        fleet, pool, job = self._fleet, self._pool, self._waiting[0]
        keys = job.arrival.keys
        self._order.now_s = fleet.now_s
        slots = pool.find_prefix(keys)
        pool.acquire(slots)
        room = pool.allocate(len(keys) - len(slots))
        if room is None:  # until a running request ends
            pool.release(slots)
            return
        self._waiting.popleft()
        num_tokens = len(keys) * self._block_tokens
        self._waiting_tokens -= num_tokens
        job.use = self._tracker.observe(keys, fleet.now_s, num_prompt_tokens=num_tokens)
        job.num_found = len(slots)
        job.slots = np.concatenate((slots, room.slots))
        if room.evicted_keys:
            fleet.after(
                _EVENT_DELAY_S, partial(fleet.router.index.removed, self._slot, "device", _words(room.evicted_keys))
            )
        self._computing = job
        tokens = max(1, (len(keys) - job.num_found) * self._block_tokens)
        steps = -(-tokens // _STEP_TOKENS)
        speeds = fleet.speeds
        took_s = tokens / speeds.prefill_tokens_per_s + steps * self._held_tokens / speeds.held_tokens_per_s
        self.prefill_tokens += tokens
        self.busy_s += took_s
        fleet.after(took_s, self._computed)

    def _computed(self) -> None:
        """The prompt under way is done: its blocks can be found, and its answer begins."""
        fleet, job = self._fleet, self._computing
        assert job is not None
        self._computing = None
        keys, first = job.arrival.keys, job.num_found
        registered = self._pool.register(keys[first:], job.slots[first:], keys[first - 1] if first else None)
        job.slots = np.concatenate((job.slots[:first], registered.slots))
        if first < len(keys):
            words = job.arrival.words
            parent = words[first - 1] if first else None
            fleet.after(_EVENT_DELAY_S, partial(fleet.router.index.stored, self._slot, "device", words[first:], parent))
        fleet.found.append(first)
        fleet.first_token_s.append(fleet.now_s - job.arrival.time_s)
        job.booking.first_token(min(first * self._block_tokens, len(keys) * self._block_tokens - 1))
        self._num_running += 1
        self._held_tokens += len(keys) * self._block_tokens
        speeds = fleet.speeds
        step_s = 1 / speeds.output_tokens_per_s + self._held_tokens / speeds.held_tokens_per_s
        fleet.step_s.append(step_s)
        fleet.after(job.arrival.num_output_tokens * step_s, partial(self._end, job))
        self._begin()

    def _end(self, job: _Job) -> None:
        keys = job.arrival.keys
        assert job.use is not None
        self._pool.release(job.slots, self._tracker.finish(job.use, keys, job.arrival.num_output_tokens))
        self._num_running -= 1
        self._held_tokens -= len(keys) * self._block_tokens
        self._fleet.num_unfinished -= 1
        job.booking.free()
        self._begin()


class SimulatedFleet:
    """N workers, a router, and a clock. Runs one trace, once."""

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
        self.step_s: list[float] = []
        self.num_unfinished = len(trace.arrivals)
        self._num_scheduled = 0
        self._due: list[tuple[float, int, _Step]] = []
        self._workers = [_Worker(self, f"worker-{n}", blocks_per_worker, eviction) for n in range(num_workers)]
        self._by_id = {worker.worker_id: worker for worker in self._workers}

    def after(self, delay_s: float, step: _Step) -> None:
        """Does something later."""
        self._num_scheduled += 1
        heappush(self._due, (self.now_s + delay_s, self._num_scheduled, step))

    def run(self) -> Outcome:
        """From the first arrival to the last end."""
        predicted_tokens = 0
        for worker in self._workers:
            worker.report()
        for number, arrival in enumerate(self.trace.arrivals):
            self._advance(arrival.time_s)
            self.now_s = arrival.time_s
            decision, booking = self.router.route(RouteQuery(tokens=arrival.tokens, request_id=str(number)))
            predicted_tokens += decision.cached_tokens
            self._by_id[decision.worker_id].take(arrival, booking)
        while self.num_unfinished:
            self._advance(self._due[0][0])
        return Outcome(
            found=np.array(self.found, dtype=np.int64),
            first_token_s=np.array(self.first_token_s),
            step_s=np.array(self.step_s),
            prefill_tokens=[worker.prefill_tokens for worker in self._workers],
            busy_s=[worker.busy_s for worker in self._workers],
            elapsed_s=self.now_s,
            predicted_tokens=predicted_tokens,
            route_s=self.router.stats().total_s.total_s,
        )

    def _advance(self, until_s: float) -> None:
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, step = heappop(self._due)
            step()


def _words(keys: Sequence[BlockKey]) -> list[int]:
    """The router's halves of block keys."""
    return [int.from_bytes(key[:8], "little") for key in keys]
