"""One worker as a front has it: reached, subscribed to, in the router, and out of it again.

registered   connect a session ─► in the router, but not taking requests ─► its blocks are known ─► takes requests
external     ask what it serves ─┘                                                                        │
                    ▲                                                                                     │
                    └──── lost: out of the router at once, with its blocks and its load ◄─────────────────┘
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from typing import Final, NoReturn

import msgspec

from dynamo.router.errors import IncompatibleWorkerError
from dynamo.router.feed import Feed
from dynamo.router.subscriber import Subscriber, SubscriberStats
from dynamo.router.workers import LoadEvent, LoadReport, WorkerCard
from dynamo.serve.discovery import Registration
from dynamo.serve.errors import WorkerLostError
from dynamo.serve.plane.link import WorkerLink
from dynamo.serve.plane.questions import fetch_metrics, fetch_snapshot, request_drain
from dynamo.serve.plane.session import WorkerSession
from dynamo.serve.stay import Stay, Surroundings

__all__ = ["Member", "RegisteredMember"]

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


class Member(ABC):
    """A worker the fleet looks after.

    Args:
        around: what it shares with the others.
    """

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._stay: Stay | None = None  # while it is in the router, and until what that took is given back
        self._complaint = ""

    @property
    @abstractmethod
    def worker_id(self) -> str: ...

    @property
    @abstractmethod
    def card(self) -> WorkerCard | None:
        """What it says of itself; None before it was reached."""

    @property
    @abstractmethod
    def link(self) -> WorkerLink | None:
        """The way to it while it is in the router."""

    @property
    def is_ready(self) -> bool:
        """It takes requests, unless it drains."""
        return self._stay is not None and self._stay.is_ready

    @property
    def report(self) -> LoadReport | None:
        """How it was last; None before its first word, and for workers that say nothing."""
        return None

    def feed_stats(self) -> SubscriberStats | None:
        """How its events come; None where there are none."""
        subscriber = None if self._stay is None else self._stay.subscriber
        return None if subscriber is None else subscriber.stats()

    def leave(self) -> None:
        """Takes it out of the router at once; its running requests go on."""
        if self._stay is not None:
            self._stay.leave()

    @abstractmethod
    async def run(self) -> NoReturn:
        """Keeps it in the router whenever it can be reached, until cancelled. Again after it has failed."""

    @abstractmethod
    async def close(self, *, patience_s: float) -> None:
        """Ends all there is of it, its running requests after `patience_s` at the latest. Not while `run` runs."""

    @abstractmethod
    async def drain(self) -> None:
        """Asks it to take nothing new and to leave."""

    @abstractmethod
    async def fetch_metrics(self) -> bytes | None:
        """Its page for Prometheus; None of a server of another make, which has one of its own for all to see.

        Raises:
            WorkerLostError: it does not answer.
        """

    def _complain(self, message: str) -> None:
        """Logs what was not logged last."""
        if message != self._complaint:
            self._complaint = message
            logger.warning("%s", message)


class RegisteredMember(Member):
    """A worker of ours, as long as one registration of it stands.

    Attributes:
        registration: what it says of itself where workers are looked for.
    """

    def __init__(self, registration: Registration, around: Surroundings) -> None:
        super().__init__(around)
        self.registration = registration
        self._session: WorkerSession | None = None
        self._report: LoadReport | None = None

    @property
    def worker_id(self) -> str:
        return self.registration.worker_id

    @property
    def pid(self) -> int:
        """The worker's process, where it runs."""
        return self.registration.pid

    @property
    def card(self) -> WorkerCard | None:
        return self.registration.card

    @property
    def link(self) -> WorkerLink | None:
        return self._session if self.is_ready else None

    @property
    def report(self) -> LoadReport | None:
        return self._report

    async def run(self) -> NoReturn:
        """See `Member.run`."""
        await self._clear()
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._connect()
            except (WorkerLostError, IncompatibleWorkerError) as error:
                self._complain(str(error))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self._complaint = ""
                # One that has said that it leaves is about to take its registration back.
                pause_s = _LONGEST_PAUSE_S if await self._serve() else _FIRST_PAUSE_S
            await self._clear()
            await asyncio.sleep(pause_s)

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
        await request_drain(self.registration.address, self.worker_id, self.registration.key)

    async def fetch_metrics(self) -> bytes | None:
        """See `Member.fetch_metrics`."""
        return await fetch_metrics(self.registration.address, self.worker_id, self.registration.key)

    async def _connect(self) -> None:
        registration, around = self.registration, self._around
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

    async def _serve(self) -> bool:
        """For as long as the session lasts; whether the worker had said that it would leave."""
        assert self._session is not None
        assert self._stay is not None
        async with asyncio.TaskGroup() as group:
            opening = group.create_task(self._stay.open())
            reason = await self._session.wait_lost()
            opening.cancel()
        if self._stay.is_draining:
            logger.info("worker %s leaves: %s", self.worker_id, reason)
        else:
            logger.warning("worker %s is lost: %s", self.worker_id, reason)
        return self._stay.is_draining

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
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._complain(f"worker {self.worker_id} sends load events that cannot be read: {error}")
            return
        self._around.router.foreign_load(self.worker_id, event)


_load_decoder = msgspec.msgpack.Decoder(LoadEvent)
