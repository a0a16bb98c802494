"""One worker as a front has it: reached, subscribed to, in the router, and out of it again.

registered   connect a session ─► in the router, but not taking requests ─► its blocks are known ─► takes requests
external     ask what it serves ─┘                                                                        │
                    ▲                                                                                     │
                    └──── lost: out of the router at once, with its blocks and its load ◄─────────────────┘
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, NoReturn, Protocol

import msgspec
import zmq

from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.router.errors import IncompatibleWorkerError
from dynamo.router.feed import Feed
from dynamo.router.foreign import ForeignKeys
from dynamo.router.router import Router
from dynamo.router.subscriber import Subscriber, SubscriberStats
from dynamo.router.workers import LoadEvent, LoadReport, WorkerCard
from dynamo.serve.discovery import Registration
from dynamo.serve.errors import WorkerLostError
from dynamo.serve.external import ExternalModel
from dynamo.serve.plane.link import WorkerLink
from dynamo.serve.plane.session import SILENCE_S, WorkerSession, fetch_snapshot, request_drain

__all__ = [
    "ExternalLink",
    "ExternalMember",
    "ExternalServer",
    "FleetTimes",
    "Member",
    "RegisteredMember",
    "Surroundings",
]

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_EXTERNAL_FINGERPRINT: Final = b"external"  # roots the keys of engines whose own say nothing to us
_MAX_HEALTH_FAILURES: Final = 2


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


class Member(Protocol):
    """A worker the fleet looks after."""

    @property
    def worker_id(self) -> str: ...
    @property
    def card(self) -> WorkerCard | None:
        """What it says of itself; None before it was reached."""
        ...

    @property
    def link(self) -> WorkerLink | None:
        """The way to it while it is in the router."""
        ...

    @property
    def is_ready(self) -> bool:
        """It takes requests, unless it drains."""
        ...

    @property
    def report(self) -> LoadReport | None:
        """How it was last; None before its first word, and for workers that say nothing."""
        ...

    def feed_stats(self) -> SubscriberStats | None:
        """How its events come; None where there are none."""
        ...

    async def run(self) -> NoReturn:
        """Keeps it in the router whenever it can be reached, until cancelled."""
        ...

    def leave(self) -> None:
        """Takes it out of the router at once; its running requests go on."""
        ...

    async def close(self, *, patience_s: float) -> None:
        """Ends all there is of it, its running requests after `patience_s` at the latest. Not while `run` runs."""
        ...

    async def drain(self) -> None:
        """Asks it to take nothing new and to leave."""
        ...


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
        self._is_draining = False
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
        if is_draining and not self._is_draining:
            logger.info("worker %s is about to leave", self.card.worker_id)
            self.drain()

    def drain(self) -> None:
        """It takes nothing new from now on."""
        self._is_draining = True
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
        if not self._is_draining:
            self._around.router.join(self.card)  # again with the same card: it keeps all it has
        self._around.changed()


class RegisteredMember:
    """A worker of ours, as long as one registration of it stands. Implements `Member`."""

    def __init__(self, registration: Registration, around: Surroundings) -> None:
        self._registration = registration
        self._around = around
        self._session: WorkerSession | None = None
        self._stay: Stay | None = None
        self._report: LoadReport | None = None
        self._complaint = ""

    @property
    def worker_id(self) -> str:
        return self._registration.worker_id

    @property
    def card(self) -> WorkerCard | None:
        return self._registration.card

    @property
    def link(self) -> WorkerLink | None:
        return None if self._stay is None or not self._stay.is_ready else self._session

    @property
    def is_ready(self) -> bool:
        return self._stay is not None and self._stay.is_ready

    @property
    def report(self) -> LoadReport | None:
        return self._report

    def feed_stats(self) -> SubscriberStats | None:
        subscriber = None if self._stay is None else self._stay.subscriber
        return None if subscriber is None else subscriber.stats()

    async def run(self) -> NoReturn:
        """See `Member.run`."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._connect()
            except (WorkerLostError, IncompatibleWorkerError) as error:
                self._complain(str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                pause_s = _FIRST_PAUSE_S
                self._complaint = ""
                await self._serve()
            await self._clear()

    def leave(self) -> None:
        """See `Member.leave`."""
        if self._stay is not None:
            self._stay.leave()

    async def close(self, *, patience_s: float) -> None:
        """See `Member.close`."""
        self.leave()
        if self._session is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._session.wait_idle()
            if not self._session.is_lost and self._session.num_requests:
                logger.warning(
                    "worker %s has left; its %d requests are ended here", self.worker_id, self._session.num_requests
                )
        await self._clear()

    async def drain(self) -> None:
        """See `Member.drain`."""
        if self._stay is not None:
            self._stay.drain()
        await request_drain(self._registration.address, self.worker_id, self._registration.key)

    async def _connect(self) -> None:
        registration, around = self._registration, self._around
        card = registration.card
        if card.model != around.model:
            raise IncompatibleWorkerError(
                f"worker {card.worker_id} serves {card.model!r}, and this front {around.model!r}; "
                "give each model a discovery folder of its own"
            )
        stay = Stay(card, around, partial(self._subscribe, registration) if registration.events else None)
        self._session = await WorkerSession.connect(
            registration.address,
            worker_id=card.worker_id,
            epoch=card.epoch,
            front_id=around.router.config.front_id,
            key=registration.key,
            on_report=partial(self._told, stay),
            on_lost=lambda reason: stay.leave(),
            silence_s=around.times.silence_s,
        )
        self._stay = stay
        stay.enter()

    async def _serve(self) -> None:
        """For as long as the session lasts."""
        assert self._session is not None
        assert self._stay is not None
        async with asyncio.TaskGroup() as group:
            opening = group.create_task(self._stay.open())
            reason = await self._session.wait_lost()
            opening.cancel()
        logger.warning("worker %s is lost: %s", self.worker_id, reason)

    async def _clear(self) -> None:
        # Cancelled halfway, it is done again by `close`.
        if self._stay is not None:
            await self._stay.close()
        if self._session is not None:
            await self._session.close()
        self._stay = self._session = None

    def _told(self, stay: Stay, load: LoadReport, is_draining: bool) -> None:
        self._report = load
        stay.told(load, is_draining)

    def _subscribe(self, registration: Registration, slot: int) -> Subscriber:
        around, card = self._around, registration.card
        feed = Feed(
            around.router.index, slot, name=card.worker_id, epoch=card.epoch, can_replay=bool(registration.replay)
        )
        return Subscriber(
            feed,
            name=card.worker_id,
            endpoint=registration.events,
            replay_endpoint=registration.replay or None,
            fetch_snapshot=partial(fetch_snapshot, registration.address, card.worker_id, registration.key),
            on_load=self._on_load,
            context=around.zmq_context,
        )

    def _on_load(self, payload: bytes) -> None:
        try:
            event = _load_decoder.decode(payload)
        except msgspec.DecodeError as error:
            self._complain(f"worker {self.worker_id} sends load events that cannot be read: {error}")
            return
        self._around.router.foreign_load(self.worker_id, event)

    def _complain(self, message: str) -> None:
        if message != self._complaint:
            self._complaint = message
            logger.warning("%s", message)


class ExternalLink(WorkerLink, Protocol):
    """The way to a server of another make; see `dynamo.serve.external.ExternalWorker`."""

    async def connect(self) -> ExternalModel: ...
    async def check_health(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalServer:
    """A server of another make that the fleet has as a member.

    Attributes:
        link: the way to it; the fleet closes it.
        events: ZMQ endpoint of its KV events in vLLM's format; None: it publishes none.
        replay: ZMQ endpoint that sends past events again; None: there is none.
        block_size: tokens of its KV blocks.
    """

    link: ExternalLink
    events: str | None = None
    replay: str | None = None
    block_size: int = 16


class ExternalMember:
    """A server of another make. Implements `Member`."""

    def __init__(self, server: ExternalServer, around: Surroundings) -> None:
        self._server = server
        self._around = around
        self._stay: Stay | None = None
        self._complaint = ""

    @property
    def worker_id(self) -> str:
        return self._server.link.worker_id

    @property
    def card(self) -> WorkerCard | None:
        return None if self._stay is None else self._stay.card

    @property
    def link(self) -> WorkerLink | None:
        return self._server.link if self.is_ready else None

    @property
    def is_ready(self) -> bool:
        return self._stay is not None and self._stay.is_ready

    @property
    def report(self) -> LoadReport | None:
        return None

    def feed_stats(self) -> SubscriberStats | None:
        subscriber = None if self._stay is None else self._stay.subscriber
        return None if subscriber is None else subscriber.stats()

    async def run(self) -> NoReturn:
        """See `Member.run`."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                model = await self._server.link.connect()
            except WorkerLostError as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    logger.warning("%s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s, self._complaint = _FIRST_PAUSE_S, ""
            self._stay = Stay(self._card(model), self._around, self._subscribe if self._server.events else None)
            self._stay.enter()
            await self._stay.open()
            await self._until_ill()
            await self._clear()

    def leave(self) -> None:
        """See `Member.leave`."""
        if self._stay is not None:
            self._stay.leave()

    async def close(self, *, patience_s: float) -> None:
        """See `Member.close`. It never leaves by itself, so nobody waits for its requests."""
        await self._clear()
        await self._server.link.close()

    async def drain(self) -> None:
        """See `Member.drain`. The server itself is not asked: others may use it."""
        if self._stay is not None:
            self._stay.drain()

    async def _until_ill(self) -> None:
        num_failures = 0
        while num_failures < _MAX_HEALTH_FAILURES:
            await asyncio.sleep(self._around.times.health_s)
            try:
                await self._server.link.check_health()
            except WorkerLostError as error:
                num_failures += 1
                if num_failures == _MAX_HEALTH_FAILURES:
                    logger.warning("%s", error)
            else:
                num_failures = 0

    async def _clear(self) -> None:
        if self._stay is not None:
            await self._stay.close()
        self._stay = None

    def _card(self, model: ExternalModel) -> WorkerCard:
        return WorkerCard(
            worker_id=self.worker_id,
            epoch=time.time_ns(),
            model=self._around.model,
            fingerprint=_EXTERNAL_FINGERPRINT.hex(),
            hash_version=HASH_VERSION,
            block_size=self._server.block_size,
            max_model_len=model.max_model_len or 0,
            has_events=self._server.events is not None,
        )

    def _subscribe(self, slot: int) -> Subscriber:
        server, around = self._server, self._around
        assert server.events is not None
        keys = ForeignKeys(self.worker_id, _EXTERNAL_FINGERPRINT, server.block_size)
        feed = Feed(
            around.router.index,
            slot,
            name=self.worker_id,
            foreign=keys,
            can_replay=server.replay is not None,
            can_snapshot=False,
        )
        return Subscriber(
            feed,
            name=self.worker_id,
            endpoint=server.events,
            replay_endpoint=server.replay,
            topics=(b"",),
            silence_s=None,
            context=around.zmq_context,
        )


_load_decoder = msgspec.msgpack.Decoder(LoadEvent)
