"""An engine made of many: each request goes to the worker the router chooses, and goes on elsewhere when that is lost.

    generate() ─► LiveRequest ─► Placer ─► worker A ──✕ lost after 7 tokens
                       ▲                                   │ booking freed, A set aside
                       └── the 7 tokens, one failure ◄─────┘
                                 └─► Placer ─► worker B: goes on with the 8th

The client sees one unbroken stream. What is carried on is the request's tokens: the next worker computes what it does not
hold of them, and its text, limits and random numbers go on exactly where the other's ended.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from dynamo.router.decision import Decision
from dynamo.router.router import Router
from dynamo.router.waiting import WaitingRoom
from dynamo.serve.engine.request import EngineStats, GenerationRequest, OutputDelta
from dynamo.serve.errors import (
    EngineDeadError,
    EngineOverloadedError,
    NoWorkerError,
    RequestError,
    ServeError,
    WorkerDrainingError,
    WorkerLostError,
)
from dynamo.serve.live_request import LiveRequest
from dynamo.serve.loss_log import LossLog
from dynamo.serve.metrics import Histogram
from dynamo.serve.placement import Links, Placement, Placer

__all__ = ["Fleet", "MigrationStats", "RoutedEngine"]

logger = logging.getLogger(__name__)

Phase = Literal["new", "ongoing"]

_DURATION_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Fleet(Links, Protocol):
    """The workers as the engine needs them; see `dynamo.serve.fleet.Fleet`."""

    @property
    def num_ready(self) -> int: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def totals(self) -> EngineStats:
        """What all workers count, also those that have left."""
        ...

    async def metrics(self) -> Mapping[str, bytes | None]:
        """The workers' own pages for Prometheus; None for one that did not answer."""
        ...


@dataclass(slots=True)
class MigrationStats:
    """What was lost and what came of it, by phase: "new" before the client had a token, "ongoing" after.

    Attributes:
        detected: workers lost under a request.
        succeeded: requests that went on elsewhere after one or more of them, counted with their next token.
        exhausted: requests that failed for it: too many failures, nowhere to go, or pinned.
        refused: workers that had no room for a request or were about to leave, by reason; it was tried elsewhere.
        duration: from the loss to the next token.
    """

    detected: Counter[Phase] = field(default_factory=Counter)
    succeeded: Counter[Phase] = field(default_factory=Counter)
    exhausted: Counter[Phase] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    duration: Histogram = field(
        default_factory=lambda: Histogram(
            "dynamo_migration_duration_seconds",
            "From the loss of a request's worker to the next token from another one.",
            _DURATION_BUCKETS_S,
        )
    )


class RoutedEngine:
    """Implements `dynamo.serve.engine.request.Engine` over a fleet of workers. Belongs to one event loop.

    Owns the fleet: `start` starts it and `stop` closes it.

    Args:
        max_model_len: most tokens of a request; what every worker takes.
        block_size: tokens per KV block of the workers, for counting what running requests hold.
        migration_limit: how many workers a request may lose and still be carried on.
        no_worker_timeout_s: how long a request waits where there is no worker at all, such as while one is restarted.
        rng: gives seeds to requests that sample and have none.

    Attributes:
        migrations: counts for metrics.
    """

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        room: WaitingRoom,
        *,
        max_model_len: int,
        block_size: int,
        migration_limit: int = 3,
        no_worker_timeout_s: float = 10.0,
        rng: random.Random | None = None,
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._placer = Placer(fleet, router, room, no_worker_timeout_s=no_worker_timeout_s)
        self._max_model_len = max_model_len
        self._block_size = block_size
        self._migration_limit = migration_limit
        self._rng = rng or random.SystemRandom()
        self.migrations = MigrationStats()
        self._losses = LossLog()

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def has_workers(self) -> bool:
        """Whether any worker takes requests."""
        return self._fleet.num_ready > 0

    async def start(self) -> None:
        await self._fleet.start()

    async def stop(self) -> None:
        await self._fleet.close()
        self._losses.flush()

    def check_healthy(self) -> None:
        """Never raises: workers come and go, and a request that finds none waits for one."""

    def stats(self) -> EngineStats:
        return self._fleet.totals()

    async def explain(self, request: GenerationRequest) -> Decision:
        """Which worker would get the request now, and why; nothing is booked and nobody waits.

        Raises:
            RequestError, NoWorkerError: none may take it.
        """
        return self._placer.explain(LiveRequest.begin(request, self._rng))

    async def worker_metrics(self) -> Mapping[str, bytes | None]:
        """The workers' own pages for Prometheus, by name; None for one that did not answer in time."""
        return await self._fleet.metrics()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        """See `Engine.generate`.

        Raises:
            WorkerLostError: the last worker it was tried at was lost as well.
            NoWorkerError: there is no worker for it, and none came.
            RequestError: 429, 404 or 503; see `Placer.place`. A pinned request is not carried on: 503.
        """
        live = LiveRequest.begin(request, self._rng)
        while not live.is_over:
            attempt = _Attempt(live, await self._place(live), self._block_size)
            try:
                sink = None if request.sink is None else attempt.offer
                async with aclosing(attempt.placement.link.generate(live.next_attempt(sink))) as gains:
                    async for deltas in gains:
                        attempt.take(deltas)
                        if live.lost_at_s is not None:
                            self._note_success(attempt)
                        yield deltas
                        if live.is_over:
                            return
                raise WorkerLostError(attempt.worker_id, "its stream ended without a finish reason")
            except (WorkerLostError, EngineDeadError, EngineOverloadedError) as error:
                self._note_failure(attempt, error)
            finally:
                attempt.placement.booking.free()

    async def _place(self, live: LiveRequest) -> Placement:
        try:
            return await self._placer.place(live)
        except (NoWorkerError, RequestError, EngineOverloadedError) as error:
            if live.last_error is None:
                raise
            # What happened to the request is that its worker was lost; that nobody else is there only made it worse.
            raise self._exhausted(live, live.last_error, error) from error

    def _note_failure(self, attempt: "_Attempt", error: ServeError) -> None:
        """Decides what becomes of a request whose attempt failed; returns if it is to be tried elsewhere."""
        live, worker_id = attempt.live, attempt.worker_id
        if isinstance(error, WorkerDrainingError | EngineOverloadedError) and not attempt.num_tokens:
            if isinstance(error, WorkerDrainingError):
                self.migrations.refused["draining"] += 1
                live.failed[worker_id] = attempt.placement.link  # for good, where the want of room may be over soon
            else:
                self.migrations.refused["overloaded"] += 1
                live.refused.add(worker_id)
            if live.request.routing.worker is not None:
                raise error
            return
        if isinstance(error, EngineDeadError):
            error = WorkerLostError(worker_id, f"its engine has ended: {error}")
        if not isinstance(error, WorkerDrainingError | EngineOverloadedError):
            self._router.set_aside(worker_id)
        logger.debug("request %s after %d tokens: %s", live.request.request_id, len(live.output_token_ids), error)
        self.migrations.detected[_phase(live)] += 1
        live.lose(worker_id, attempt.placement.link, error, time.perf_counter())
        if live.request.routing.worker is not None:
            raise self._exhausted(live, _pinned_worker_lost(worker_id), error) from error
        if live.num_failures > self._migration_limit:
            raise self._exhausted(live, error, error)
        self._losses.note(worker_id, "goes on", error)

    def _note_success(self, attempt: "_Attempt") -> None:
        live = attempt.live
        if live.lost_at_s is None or not attempt.num_tokens:
            return
        self.migrations.duration.observe(time.perf_counter() - live.lost_at_s)
        self.migrations.succeeded["ongoing" if attempt.num_taken_over else "new"] += 1
        live.lost_at_s = None

    def _exhausted(self, live: LiveRequest, told: ServeError, reason: ServeError) -> ServeError:
        """Gives a request up: what its client is told, and what the log is."""
        self.migrations.exhausted[_phase(live)] += 1
        self._losses.note(live.last_worker, "is given up", reason)
        return told


class _Attempt:
    """One worker's part of a request: what it delivers, and what the router is told of it.

    Attributes:
        num_taken_over: tokens that others had generated before.
    """

    __slots__ = ("_block_size", "_next_mark", "live", "num_taken_over", "placement")

    def __init__(self, live: LiveRequest, placement: Placement, block_size: int) -> None:
        self.live = live
        self.placement = placement
        self.num_taken_over = len(live.output_token_ids)
        self._block_size = block_size
        self._next_mark = self.num_taken_over + 1  # the worker's first token, then the last one of each block

    @property
    def worker_id(self) -> str:
        return self.placement.decision.worker_id

    @property
    def num_tokens(self) -> int:
        """Tokens that came from this worker."""
        return len(self.live.output_token_ids) - self.num_taken_over

    def offer(self, deltas: list[OutputDelta]) -> bool:
        """Offers deltas to the sink of the client's request, as a `DeltaSink` itself."""
        live = self.live
        sink = live.request.sink
        if sink is None or live.lost_at_s is not None:
            return False
        live.correct(deltas)
        if not sink(deltas):
            return False
        self.take(deltas)
        return True

    def take(self, deltas: Sequence[OutputDelta]) -> None:
        """Notes deltas that arrived together. Once for every step of every stream, so most of the time next to nothing."""
        live = self.live
        # Of a request that is carried on, the worker also finds what others generated: that is not compared.
        found = deltas[-1].num_cached_tokens if live.num_attempts == 1 else None
        live.take(deltas)
        num_outputs = len(live.output_token_ids)
        if num_outputs >= self._next_mark:
            booking = self.placement.booking
            booking.first_token()
            booking.output_blocks(num_outputs // self._block_size)
            self._next_mark = (num_outputs // self._block_size + 1) * self._block_size
        if live.is_over:
            self.placement.booking.first_token(found)


def _phase(live: LiveRequest) -> Phase:
    return "ongoing" if live.has_delivered else "new"


def _pinned_worker_lost(worker_id: str) -> RequestError:
    return RequestError(
        f"worker {worker_id!r} was lost, and the request asked for no other; send it again without dynamo.worker",
        status=503,
        type="service_unavailable",
        param="dynamo.worker",
        code="pinned_worker_lost",
    )
