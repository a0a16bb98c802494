"""A server of another make as a member of a fleet: it registers nowhere, so it is asked again and again how it is."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol

from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.router.feed import Feed
from dynamo.router.foreign import ForeignKeys
from dynamo.router.subscriber import Subscriber
from dynamo.router.workers import WorkerCard
from dynamo.serve.errors import WorkerLostError
from dynamo.serve.external import ExternalModel
from dynamo.serve.members import Member
from dynamo.serve.plane.link import WorkerLink
from dynamo.serve.stay import Stay, Surroundings

__all__ = ["ExternalLink", "ExternalMember", "ExternalServer"]

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_MAX_HEALTH_FAILURES: Final = 2
_FINGERPRINT: Final = b"external"  # roots the keys of engines whose own say nothing to us


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


class ExternalMember(Member):
    """A server of another make."""

    def __init__(self, server: ExternalServer, around: Surroundings) -> None:
        super().__init__(around)
        self._server = server

    @property
    def worker_id(self) -> str:
        return self._server.link.worker_id

    @property
    def card(self) -> WorkerCard | None:
        return None if self._stay is None else self._stay.card

    @property
    def link(self) -> WorkerLink | None:
        return self._server.link if self.is_ready else None

    async def run(self) -> NoReturn:
        """See `Member.run`."""
        await self._clear()
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                model = await self._server.link.connect()
            except WorkerLostError as error:
                self._complain(str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s, self._complaint = _FIRST_PAUSE_S, ""
            self._stay = Stay(self._card(model), self._around, self._subscribe if self._server.events else None)
            self._stay.enter()
            await self._stay.open()
            await self._until_ill()
            await self._clear()

    async def close(self, *, patience_s: float) -> None:
        """See `Member.close`. It never leaves by itself, so nobody waits for its requests."""
        await self._clear()
        await self._server.link.close()

    async def drain(self) -> None:
        """See `Member.drain`. The server itself is not asked: others may use it."""
        if self._stay is not None:
            self._stay.drain()

    async def fetch_metrics(self) -> bytes | None:
        """See `Member.fetch_metrics`."""
        return None

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
            fingerprint=_FINGERPRINT.hex(),
            hash_version=HASH_VERSION,
            block_size=self._server.block_size,
            max_model_len=model.max_model_len or 0,
            has_events=self._server.events is not None,
        )

    def _subscribe(self, slot: int) -> Subscriber:
        server, around = self._server, self._around
        assert server.events is not None
        keys = ForeignKeys(self.worker_id, _FINGERPRINT, server.block_size)
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
