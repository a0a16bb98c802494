"""One worker's time in the router: entered without requests, ready once its blocks are known, left in an instant."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from dynamo.router.router import Router
from dynamo.router.subscriber import Subscriber
from dynamo.router.workers import LoadReport, WorkerCard
from dynamo.serve.plane.session import SILENCE_S

__all__ = ["FleetTimes", "Stay", "Surroundings"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTimes:
    """In seconds.

    Attributes:
        silence_s: a worker whose session says nothing for so long is lost.
        ready_s: how long a worker's blocks may take to become known before it gets requests all the same.
        health_s: between two looks at an external server.
        farewell_s: how long the requests of a worker that has left in order may take.
    """

    silence_s: float = SILENCE_S
    ready_s: float = 2.0
    health_s: float = 2.0
    farewell_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all members of a fleet share. `changed` is called whenever one becomes ready or ceases to be."""

    router: Router
    model: str
    times: FleetTimes
    zmq_context: "zmq.Context[zmq.Socket[bytes]]"
    changed: Callable[[], None]


class Stay:
    """One worker's time in the router, from its entry until it is lost or has left.

    Args:
        subscriber: makes what applies the worker's events to its slot of the index; None where there are none.
    """

    def __init__(self, card: WorkerCard, around: Surroundings, subscriber: Callable[[int], Subscriber] | None) -> None:
        self.card = card
        self.is_ready = False
        self.subscriber: Subscriber | None = None
        self._around = around
        self._make_subscriber = subscriber
        self._is_in = False
        self.is_draining = False
        self._heard: LoadReport | None = None

    def enter(self) -> None:
        """Joins the router, without taking requests yet.

        Raises:
            IncompatibleWorkerError: see `Router.join`.
        """
        slot = self._around.router.join(self.card)
        self._around.router.drain(self.card.worker_id)
        self._is_in = True
        if self._heard is not None:
            self._around.router.report(self.card.worker_id, self._heard)
        if self._make_subscriber is not None:
            self.subscriber = self._make_subscriber(slot)

    async def open(self) -> None:
        """Waits until the worker's blocks are known, for a time, and has it take requests."""
        if self.subscriber is not None:
            await self.subscriber.start()
            if not await self.subscriber.wait_ready(self._around.times.ready_s) and self._is_in:
                logger.warning(
                    "what worker %s holds is still not known after %g s; it gets requests all the same",
                    self.card.worker_id,
                    self._around.times.ready_s,
                )
        if self._is_in:
            self.is_ready = True
            self._take_requests()
            logger.info("worker %s takes requests", self.card.worker_id)

    def told(self, load: LoadReport, is_draining: bool) -> None:
        """The worker says how it is; the first time maybe before `enter`."""
        self._heard = load
        if self._is_in:
            self._around.router.report(self.card.worker_id, load)
        if is_draining and not self.is_draining:
            logger.info("worker %s is about to leave", self.card.worker_id)
            self.drain()

    def drain(self) -> None:
        """It takes nothing new from now on."""
        self.is_draining = True
        if self._is_in:
            self._around.router.drain(self.card.worker_id)
            self._around.changed()

    def leave(self) -> None:
        """Out of the router at once, with all that is known of the worker. Idempotent."""
        if not self._is_in:
            return
        self._is_in = self.is_ready = False
        if self.subscriber is not None:
            self.subscriber.stop()
        self._around.router.leave(self.card.worker_id)
        self._around.changed()

    async def close(self) -> None:
        """Also gives back what the stay held. Idempotent."""
        self.leave()
        if self.subscriber is not None:
            await self.subscriber.close()

    def _take_requests(self) -> None:
        if not self.is_draining:
            self._around.router.join(self.card)  # again with the same card: it keeps all it has
        self._around.changed()
