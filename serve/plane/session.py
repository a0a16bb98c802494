"""A session with one worker, at the front's end.

    generate() ── Submit, Abort ──► body of one POST that does not end ──►
    OutputStream ◄── Step, Failed ◄── its answer, which does not end either ◄──

One connection carries all requests to the worker, so 64 streams cost one read and one decode a step. When it breaks, all of
them learn of it at once.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Final

import aiohttp
import msgspec

from dynamo.router.workers import LoadReport
from dynamo.serve.engine.delivery import OutputStream
from dynamo.serve.engine.request import GenerationRequest, OutputDelta
from dynamo.serve.errors import (
    EngineDeadError,
    EngineOverloadedError,
    RequestFailedError,
    ServeError,
    WorkerDrainingError,
    WorkerLostError,
)
from dynamo.serve.plane.frames import FrameError, FrameParser, frame
from dynamo.serve.plane.messages import (
    PROTOCOL_VERSION,
    Abort,
    Failed,
    Hello,
    Ping,
    Report,
    Step,
    Welcome,
    decode_down,
    delta_of,
    encode,
    submit_of,
)
from dynamo.serve.plane.questions import worker_client

__all__ = ["SILENCE_S", "WorkerSession"]

logger = logging.getLogger(__name__)

SILENCE_S: Final = 3.0
"""A worker that reports every second and is not heard of for so long is lost."""

_PING_S: Final = 1.0
_CONNECT_TIMEOUT_S: Final = 5.0
_MAX_PIECE_BYTES: Final = 1 << 20  # of what is sent, so that a worker that reads slowly is seen to read
_MAX_REFUSAL_BYTES: Final = 4096


class WorkerSession:
    """Implements `WorkerLink` over one connection. Made by `connect`; once lost it stays lost.

    Attributes:
        num_requests: that are live on it.
    """

    def __init__(
        self,
        worker_id: str,
        epoch: int,
        client: aiohttp.ClientSession,
        *,
        on_report: Callable[[LoadReport, bool], None],
        on_lost: Callable[[str], None],
        silence_s: float,
    ) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._client = client
        self._on_report = on_report
        self._on_lost = on_lost
        self._silence_s = silence_s
        self._unsent: deque[bytes] = deque()
        self._has_unsent = asyncio.Event()
        self._streams: dict[int, OutputStream] = {}
        self._next_number = 0
        self._response: aiohttp.ClientResponse | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._is_welcome = False
        self._loss: str | None = None
        self._lost = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        loop = asyncio.get_running_loop()
        self._now = loop.time
        self._heard_s = self._taken_s = loop.time()

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        worker_id: str,
        epoch: int,
        front_id: str,
        key: str = "",
        on_report: Callable[[LoadReport, bool], None] = lambda load, is_draining: None,
        on_lost: Callable[[str], None] = lambda reason: None,
        silence_s: float = SILENCE_S,
    ) -> "WorkerSession":
        """Opens a session with a worker.

        Args:
            address: "unix:PATH" or "http://HOST:PORT".
            epoch: the incarnation that is expected there; another one is refused.
            front_id: unique name of this front.
            on_report: is told how the worker is and whether it is about to leave, once a second; must not raise.
            on_lost: is told why the session has ended, before any of its requests is; must not raise.
            silence_s: a worker that says nothing for so long is lost.

        Raises:
            WorkerLostError: nobody answers there, or the worker refuses the session; the message says why.
        """
        client = worker_client(address, key)
        session = cls(worker_id, epoch, client, on_report=on_report, on_lost=on_lost, silence_s=silence_s)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await session._open(front_id)
        except TimeoutError:
            await session.close()
            raise WorkerLostError(worker_id, f"{address} did not answer within {_CONNECT_TIMEOUT_S:g} s") from None
        except BaseException:
            await session.close()
            raise
        return session

    @property
    def worker_id(self) -> str:
        return self._worker_id

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    @property
    def is_lost(self) -> bool:
        return self._loss is not None

    async def wait_lost(self) -> str:
        """Waits until the session has ended, for whatever reason, and says which."""
        await self._lost.wait()
        return self._loss or ""

    async def wait_idle(self) -> None:
        """Waits until no request is live on it."""
        await self._idle.wait()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        """See `WorkerLink.generate`."""
        number = self._submit(request)
        stream = self._streams[number]
        is_over = False
        try:
            while not is_over:
                deltas = await stream.next()
                is_over = deltas[-1].finish_reason is not None
                yield deltas
        finally:
            # The stream is not there any more if the worker has ended the request, or the session has.
            if self._take_out(number) is not None:
                self._say(encode(Abort(number)))

    async def close(self) -> None:
        """Closes the connection; the worker aborts what still runs on it. Idempotent."""
        self._lose("the session was closed")
        try:
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.wait([self._reading])
        finally:
            await self._client.close()

    def _submit(self, request: GenerationRequest) -> int:
        if self._loss is not None:
            raise WorkerLostError(self._worker_id, self._loss)
        number = self._next_number
        try:
            payload = frame(encode(submit_of(number, request)))
        except (ValueError, OverflowError, FrameError) as error:
            raise RequestFailedError(f"request {request.request_id} cannot be sent to a worker: {error}") from error
        self._next_number += 1
        self._streams[number] = OutputStream(request.hold_s, request.sink)
        self._idle.clear()
        self._send(payload)
        return number

    def _take_out(self, number: int) -> OutputStream | None:
        stream = self._streams.pop(number, None)
        if not self._streams:
            self._idle.set()
        return stream

    def _say(self, payload: bytes) -> None:
        if self._loss is None:
            self._send(frame(payload))

    def _send(self, data: bytes) -> None:
        # However much: when a worker is lost, its requests with their long prompts come to the others in one moment.
        if not self._unsent:
            self._taken_s = self._now()
        self._unsent.append(data)
        self._has_unsent.set()

    async def _body(self) -> AsyncIterator[bytes]:
        """What is sent, until the session is closed; aiohttp takes a piece when it has written the one before."""
        while True:
            await self._has_unsent.wait()
            self._has_unsent.clear()
            while self._unsent:
                pieces, num_bytes = [], 0
                while self._unsent and num_bytes < _MAX_PIECE_BYTES:
                    pieces.append(self._unsent.popleft())
                    num_bytes += len(pieces[-1])
                self._taken_s = self._now()
                yield b"".join(pieces)
                self._taken_s = self._now()

    async def _open(self, front_id: str) -> None:
        # aiohttp sends the headers together with the first piece of the body: without a Hello both sides would wait.
        self._send(frame(encode(Hello(PROTOCOL_VERSION, front_id, self._worker_id, self._epoch))))
        try:
            response = await self._client.post("/session", data=self._body())
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerLostError(self._worker_id, f"no session can be opened: {error}") from error
        self._response = response
        if response.status != 200:
            said = await response.content.read(_MAX_REFUSAL_BYTES)
            reason = f"it refuses the session with status {response.status}: {said.decode(errors='replace')}"
            raise WorkerLostError(self._worker_id, reason)
        self._heard_s = self._now()
        welcomed = asyncio.Event()
        self._reading = asyncio.create_task(self._read(response.content, welcomed))
        self._tick(self._now())
        await welcomed.wait()
        if self._loss is not None:
            raise WorkerLostError(self._worker_id, self._loss)

    async def _read(self, content: aiohttp.StreamReader, welcomed: asyncio.Event) -> None:
        parser = FrameParser()
        reason = "it made this front fail"
        try:
            while data := await content.readany():
                self._heard_s = self._now()
                for payload in parser.feed(data):
                    self._hear(payload)
                if self._is_welcome:
                    welcomed.set()
            reason = "it has closed the session" if parser.is_between_frames else "its stream ended inside a frame"
        except (FrameError, msgspec.DecodeError, _ProtocolError) as error:
            logger.error("the session with worker %s ends: it sent what cannot be read: %s", self._worker_id, error)
            reason = f"it sent what cannot be read: {error}"
        except aiohttp.ClientPayloadError:
            reason = "its stream broke off"  # what aiohttp says of it is about chunks
        except (aiohttp.ClientError, OSError) as error:
            reason = f"the stream broke: {error}"
        finally:
            self._lose(reason)
            welcomed.set()

    def _hear(self, payload: memoryview) -> None:
        match decode_down(payload):
            case Step(gains) if self._is_welcome:
                streams = self._streams
                for gain in gains:
                    stream = streams.get(gain.number)
                    if stream is not None:  # else it was aborted while this was on its way
                        stream.feed(delta_of(gain))
                        if gain.finish_reason is not None:
                            self._take_out(gain.number)
            case Failed(number, kind, message) if self._is_welcome:
                if (stream := self._take_out(number)) is not None:
                    stream.fail(self._failure(kind, message))
            case Report(load, is_draining) if self._is_welcome:
                self._on_report(load, is_draining)
            case Welcome(protocol, worker_id, epoch) if not self._is_welcome:
                if (protocol, worker_id, epoch) != (PROTOCOL_VERSION, self._worker_id, self._epoch):
                    raise _ProtocolError(f"it is {worker_id} of epoch {epoch} and speaks protocol {protocol}")
                self._is_welcome = True
            case message:
                raise _ProtocolError(f"a {type(message).__name__} out of place")

    def _failure(self, kind: str, message: str) -> ServeError:
        match kind:
            case "overloaded":
                return EngineOverloadedError(message)
            case "dead":
                return EngineDeadError(message)
            case "draining":
                return WorkerDrainingError(self._worker_id, message)
        return RequestFailedError(message)

    def _tick(self, due_s: float) -> None:
        """Every ping interval: says that the front lives, and listens whether the worker does."""
        now = self._now()
        period_s = min(_PING_S, self._silence_s / 4)
        if now - due_s > period_s:
            # This process itself stood still: what the worker said meanwhile is still to be read.
            self._heard_s = self._taken_s = now
        if now - self._heard_s > self._silence_s:
            self._lose(f"nothing was heard of it for {now - self._heard_s:.1f} s")
            return
        if self._unsent and now - self._taken_s > self._silence_s:
            self._lose(f"it has read nothing for {now - self._taken_s:.1f} s")
            return
        self._say(encode(Ping()))
        loop = asyncio.get_running_loop()
        self._ticking = loop.call_at(now + period_s, self._tick, now + period_s)

    def _lose(self, reason: str) -> None:
        """Ends the session; every request on it is told. Idempotent."""
        if self._loss is not None:
            return
        self._loss = reason
        if self._ticking is not None:
            self._ticking.cancel()
        if self._response is not None:
            self._response.close()
        if self._is_welcome:
            self._on_lost(reason)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(WorkerLostError(self._worker_id, reason))
        self._idle.set()
        self._lost.set()


class _ProtocolError(Exception):
    """The worker says what it must not say."""
