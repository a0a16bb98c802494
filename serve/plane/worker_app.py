"""A worker as an ASGI application: sessions with fronts, and what a front or an operator asks about it.

    POST /session    full duplex, see `messages`
    GET  /snapshot   what each tier holds, see `dynamo.kvcache.event_wire`
    GET  /card       what it says of itself, JSON
    GET  /health     200 ready, 503 draining or dead
    GET  /metrics    Prometheus
    POST /drain      no new requests; the process that owns the application leaves when it has none any more

It is meant for a Unix socket in a folder of its owner's, or a loopback port with a key.
"""

import asyncio
import hmac
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.types import Receive, Scope, Send

from dynamo.kvcache.event_wire import encode_snapshot
from dynamo.kvcache.events import Snapshot
from dynamo.router.workers import LoadEvent, LoadReport, WorkerCard
from dynamo.serve.engine.request import Engine
from dynamo.serve.errors import EngineDeadError
from dynamo.serve.plane.frames import FrameError
from dynamo.serve.plane.front_session import FrameSource, FrontSession, SessionTimes
from dynamo.serve.plane.messages import PROTOCOL_VERSION, Hello, Report, Welcome, decode_up

__all__ = ["WorkerApp"]

logger = logging.getLogger(__name__)

_HELLO_TIMEOUT_S: Final = 5.0
_PIECE_BYTES: Final = 1 << 20  # of a long answer, so that it does not lie in the socket's buffer as a whole
_HEADERS: Final = [(b"connection", b"close")]


class WorkerApp:
    """Serves an engine to fronts. Owns the sessions, not the engine. Everything happens on the event loop that runs it.

    Args:
        card: what the worker registered with.
        report: the engine's and the cache's numbers; called once a second for each session.
        snapshot: what the cache holds; called on a thread. None: this worker has no events, and no snapshot.
        publish_load: is given each load event, msgpack of `LoadEvent`; must not wait. None: nobody listens.
        key: asked of every request as bearer; None lets everybody in who can open the socket.
        collectors: of /metrics.
        times: what is expected of fronts.

    Attributes:
        drain_requested: somebody asked for it over HTTP, or `begin_drain` was called.
    """

    def __init__(
        self,
        engine: Engine,
        card: WorkerCard,
        *,
        report: Callable[[], LoadReport],
        snapshot: Callable[[], Snapshot] | None = None,
        publish_load: Callable[[bytes], None] | None = None,
        key: str | None = None,
        collectors: Sequence[Collector] = (),
        times: SessionTimes | None = None,
    ) -> None:
        self.engine: Final = engine
        self.card: Final = card
        self.block_size: Final = card.block_size
        self.times: Final = times or SessionTimes()
        self.drain_requested = asyncio.Event()
        self._report = report
        self._snapshot = snapshot
        self._publish_load = publish_load
        self._key = None if key is None else f"Bearer {key}".encode()
        self._registry = CollectorRegistry(auto_describe=False)
        for collector in collectors:
            self._registry.register(collector)
        self._sessions: dict[int, FrontSession] = {}
        self._num_sessions = 0
        self._is_closed = False
        self._request_ended = asyncio.Event()
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def is_draining(self) -> bool:
        return self.drain_requested.is_set()

    @property
    def num_requests(self) -> int:
        """Of all fronts."""
        return sum(session.num_requests for session in self._sessions.values())

    def begin_drain(self) -> None:
        """From now on new requests are sent elsewhere, and every front is told; running ones go on."""
        self.drain_requested.set()
        for session in self._sessions.values():
            session.report_soon()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no request is left; False when the time was not enough."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.num_requests:
                    self._request_ended.clear()
                    await self._request_ended.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Ends all sessions; fronts carry what still runs on elsewhere. No new session is accepted. Idempotent."""
        self._is_closed = True
        for session in self._sessions.values():
            session.end()
        await self._all_ended.wait()

    def report(self) -> Report:
        """See `ServingWorker`; so are the next ones."""
        return Report(self._report(), self.is_draining)

    def request_ended(self) -> None:
        self._request_ended.set()

    def publish(self, event: LoadEvent) -> None:
        if self._publish_load is not None:
            self._publish_load(self._encoder.encode(event))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")
        if self._key is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):
                await _answer(send, 401, {"error": "the worker's key is asked for: Authorization: Bearer KEY"})
                return
        match scope["method"], scope["path"]:
            case "POST", "/session":
                await self._serve_session(receive, send)
            case "GET", "/snapshot":
                await self._send_snapshot(send)
            case "GET", "/card":
                await _answer(send, 200, asdict(self.card))
            case "GET", "/health":
                status = self._status()
                await _answer(send, 200 if status == "ready" else 503, {"status": status})
            case "GET", "/metrics":
                await _send(send, 200, generate_latest(self._registry), CONTENT_TYPE_LATEST.encode())
            case "POST", "/drain":
                self.begin_drain()
                await _answer(send, 202, {"status": "draining"})
            case method, path:
                await _answer(send, 404, {"error": f"there is no {method} {path} at a worker"})

    def _status(self) -> str:
        try:
            self.engine.check_healthy()
        except EngineDeadError:
            return "dead"
        return "draining" if self.is_draining or self._is_closed else "ready"

    async def _serve_session(self, receive: Receive, send: Send) -> None:
        source = FrameSource(receive)
        hello = await self._read_hello(source)
        refusal = hello if isinstance(hello, str) else self._find_mismatch(hello)
        if refusal is not None or isinstance(hello, str):
            logger.error("a session is refused: %s", refusal)
            await _answer(send, 409, {"error": refusal})
            return
        if self._is_closed:
            await _answer(send, 503, {"error": f"worker {self.card.worker_id} is going away"})
            return
        number = self._num_sessions
        self._num_sessions += 1
        session = FrontSession(hello.front_id, number, self)
        self._sessions[number] = session
        self._all_ended.clear()
        logger.info("front %s has opened a session", hello.front_id)
        try:
            headers = [(b"content-type", b"application/octet-stream"), *_HEADERS]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await session.run(Welcome(PROTOCOL_VERSION, self.card.worker_id, self.card.epoch), source, send)
        finally:
            del self._sessions[number]
            if not self._sessions:
                self._all_ended.set()
            logger.info("the session with front %s is over", hello.front_id)

    async def _read_hello(self, source: FrameSource) -> Hello | str:
        """The front's first words, or what is wrong with them."""
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                payload = await source.first()
            if payload is None:
                return "the stream ended before a Hello"
            message = decode_up(payload)
        except TimeoutError:
            return f"no Hello came within {_HELLO_TIMEOUT_S:g} s"
        except (FrameError, msgspec.DecodeError) as error:
            return f"no Hello, and of another protocol than {PROTOCOL_VERSION}: {error}"
        return message if isinstance(message, Hello) else f"a {type(message).__name__} came before a Hello"

    def _find_mismatch(self, hello: Hello) -> str | None:
        card = self.card
        if hello.protocol != PROTOCOL_VERSION:
            return (
                f"front {hello.front_id} speaks protocol {hello.protocol}, worker {card.worker_id} speaks "
                f"{PROTOCOL_VERSION}; run the same release on both sides"
            )
        if (hello.worker_id, hello.epoch) != (card.worker_id, card.epoch):
            return (
                f"front {hello.front_id} looks for worker {hello.worker_id} of epoch {hello.epoch}, and this is "
                f"{card.worker_id} of epoch {card.epoch}; its registration is of a process that is gone"
            )
        return None

    async def _send_snapshot(self, send: Send) -> None:
        if self._snapshot is None:
            await _answer(send, 404, {"error": "this worker publishes no events, and no snapshot"})
            return
        take = self._snapshot
        body = await asyncio.to_thread(lambda: encode_snapshot(take(), epoch=self.card.epoch))
        await _send(send, 200, body, b"application/octet-stream")


async def _answer(send: Send, status: int, body: object) -> None:
    await _send(send, status, msgspec.json.encode(body), b"application/json")


async def _send(send: Send, status: int, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for start in range(0, len(body), _PIECE_BYTES):
        await send({"type": "http.response.body", "body": body[start : start + _PIECE_BYTES], "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
