"""Finding a worker for a request: the router's choice, the wait for one that has room, and the way to it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dynamo.router.decision import Decision, RouteQuery
from dynamo.router.errors import (
    NoWorkersError,
    PinnedWorkerError,
    WaitedTooLongError,
    WaitingRoomFullError,
)
from dynamo.router.router import Booking, Router
from dynamo.router.waiting import WaitingRoom
from dynamo.serve.errors import EngineOverloadedError, NoWorkerError, RequestError
from dynamo.serve.live_request import LiveRequest
from dynamo.serve.openai import MAX_PRIORITY
from dynamo.serve.plane.link import WorkerLink
from dynamo.serve.routing_hints import no_such_worker

__all__ = ["Links", "Placement", "Placer", "query_of"]

_MAX_LISTED = 8
_CARRIED_ON_PRIORITY = MAX_PRIORITY + 1  # its client has been served half: it goes before all that have nothing yet


class Links(Protocol):
    """The ways to the workers that the router knows."""

    def link(self, worker_id: str) -> WorkerLink | None:
        """The way to a worker, another object for each incarnation of it; None if it has just gone."""
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker for one attempt. Whoever has it frees the booking when the attempt is over."""

    link: WorkerLink
    decision: Decision
    booking: Booking


class Placer:
    """Places requests. Belongs to the event loop of the links.

    Args:
        no_worker_timeout_s: how long a request waits for a worker to join, such as one that is restarted.
    """

    def __init__(self, links: Links, router: Router, room: WaitingRoom, *, no_worker_timeout_s: float) -> None:
        self._links = links
        self._router = router
        self._room = room
        self._no_worker_timeout_s = no_worker_timeout_s
        self._changed: asyncio.Future[None] | None = None
        router.when_room(self._on_room)

    async def place(self, live: LiveRequest) -> Placement:
        """A worker for the request's next attempt; waits where all are busy, or none is there.

        Raises:
            RequestError: 404 or 503, the worker it is pinned to may not serve it; 404, it excludes all there are; 429, it
                waited too long for room.
            EngineOverloadedError: every worker that may serve it has refused it for want of room.
            NoWorkerError: no worker may serve it, and none has joined in time.
        """
        begun_s = time.perf_counter()
        deadline_s = begun_s + self._no_worker_timeout_s
        tokens = live.tokens()  # once: those that wait for a worker ask again whenever anything has changed
        while True:
            query = query_of(live, tokens, self._barred(live))
            try:
                decision, booking = await self._room.route(query, priority=_priority(live))
            except NoWorkersError as error:
                if live.refused and not live.has_delivered:
                    raise EngineOverloadedError("all workers have as many requests waiting as they accept") from error
                live.refused.clear()
                if self._router.settled_s >= self._no_worker_timeout_s:
                    self._check_exclusion(live)
                await self._wait(deadline_s, error)
                continue
            except PinnedWorkerError as error:
                raise self._pin_refusal(error) from error
            except (WaitingRoomFullError, WaitedTooLongError) as error:
                raise _no_room(str(error)) from error
            link = self._links.link(decision.worker_id)
            if link is not None:
                _note(live, decision, time.perf_counter() - begun_s)
                return Placement(link, decision, booking)
            booking.free()
            await self._wait(deadline_s, NoWorkersError(f"worker {decision.worker_id} has just gone"))

    def explain(self, live: LiveRequest) -> Decision:
        """Where the request would go now, with the costs at all workers. Books nothing and waits for nothing.

        Raises:
            RequestError: 404 or 503, the worker it is pinned to may not serve it; 404, it excludes all there are.
            NoWorkerError: no worker may serve it.
        """
        try:
            return self._router.explain(query_of(live, live.tokens(), self._barred(live)))
        except PinnedWorkerError as error:
            raise self._pin_refusal(error) from error
        except NoWorkersError as error:
            self._check_exclusion(live)
            raise NoWorkerError(str(error)) from error

    def _check_exclusion(self, live: LiveRequest) -> None:
        """Refuses a request for which waiting is no use while workers neither come nor go: its client excludes them all."""
        there = self._router.worker_ids
        if there and live.request.routing.exclude.issuperset(there):
            raise RequestError(
                f"all workers are excluded, {_listed(there)}; leave one of them out of dynamo.exclude",
                status=404,
                param="dynamo.exclude",
                code="worker_not_found",
            )

    def _barred(self, live: LiveRequest) -> frozenset[str]:
        """Workers that failed it and have not come back since, and those that had no room for it."""
        failed = {worker_id for worker_id, link in live.failed.items() if self._links.link(worker_id) in (link, None)}
        return frozenset(failed | live.refused)

    async def _wait(self, deadline_s: float, reason: NoWorkersError) -> None:
        """Waits until something has changed at the workers."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(deadline_s - time.perf_counter()):
                await asyncio.shield(self._changed)
        except TimeoutError:
            raise NoWorkerError(str(reason)) from reason

    def _pin_refusal(self, error: PinnedWorkerError) -> RequestError:
        if error.worker_id is None:
            return RequestError(
                f"{error}; name a worker in dynamo.worker", param="dynamo.worker", code="missing_required_parameter"
            )
        if error.worker_id not in self._router.worker_ids:
            return no_such_worker(error.worker_id, "it is no member now")
        return RequestError(
            f"{error}; leave dynamo.worker out to let the server choose",
            status=503,
            type="service_unavailable",
            param="dynamo.worker",
            code="worker_unavailable",
        )

    def _on_room(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None and not changed.done():
            changed.set_result(None)


def query_of(live: LiveRequest, tokens: memoryview, barred: frozenset[str]) -> RouteQuery:
    """What the router is asked of a request's next attempt.

    Args:
        tokens: those of `live`.
        barred: workers that may not have it, beside those the client excludes.
    """
    request, sampling = live.request, live.request.sampling
    # Most replies end long before their limit: only where nothing else can end one is its length known.
    is_length_known = sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids
    return RouteQuery(
        tokens=tokens,
        request_id=request.request_id,
        salt=request.cache_salt,
        expected_output_tokens=sampling.max_tokens - len(live.output_token_ids) if is_length_known else None,
        pin=request.routing.worker,
        exclude=request.routing.exclude | barred,
        session=request.routing.session,
    )


def _listed(worker_ids: Sequence[str]) -> str:
    more = len(worker_ids) - _MAX_LISTED
    return ", ".join(sorted(worker_ids)[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _priority(live: LiveRequest) -> int:
    return _CARRIED_ON_PRIORITY if live.has_delivered else live.request.routing.priority


def _note(live: LiveRequest, decision: Decision, elapsed_s: float) -> None:
    journey, thought_s = live.journey, decision.overhead.total_s
    if not live.has_delivered:
        journey.overlap_blocks = decision.reach.remote
        journey.predicted_cached_tokens = decision.cached_tokens
    journey.worker_id = decision.worker_id
    journey.route_s += thought_s
    journey.queue_s += max(0.0, elapsed_s - thought_s)


def _no_room(why: str) -> RequestError:
    return RequestError(why, status=429, type="rate_limit_error", code="workers_busy")
