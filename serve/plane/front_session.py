"""A session with one front, at the worker's end.

    ASGI receive ──► Submit: a task over Engine.generate ──► gains ─┐
                     Abort: the task is cancelled                   ├─► one write for all that a step brought ──► ASGI send
    Report, every second ───────────────────────────────────────────┘

The engine hands a step's deltas to all its streams in one turn of the event loop; their tasks run in the next, the first of
them wakes the writer, and so it finds the whole step.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import msgspec
from starlette.types import Receive, Send

from dynamo.router.workers import LoadEvent, LoadKind
from dynamo.serve.engine.request import Engine, GenerationRequest, OutputDelta
from dynamo.serve.errors import EngineDeadError, EngineOverloadedError, RequestFailedError, ServeError
from dynamo.serve.plane.frames import FrameError, FrameParser, frame
from dynamo.serve.plane.messages import (
    Abort,
    Failed,
    FailureKind,
    Gain,
    Hello,
    Ping,
    Report,
    Step,
    Submit,
    Welcome,
    decode_up,
    encode,
    gain_of,
    request_of,
)

__all__ = ["FrameSource", "FrontSession", "SessionTimes"]

logger = logging.getLogger(__name__)

_MAX_GAINS_AHEAD: Final = 8192  # unsent; beyond, the session's requests leave their deltas in the engine's streams
_MAX_GAINS_PER_FRAME: Final = 4096
_END_TIMEOUT_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTimes:
    """What a worker expects of a front, in seconds.

    Attributes:
        report_s: a report at least so often.
        stall_s: a front that takes nothing for so long is cut off.
        silence_s: and one that says nothing for so long. Much more than the time between two pings, since a front that
            merely was slow must send all its requests elsewhere then; one that is gone is noticed by its closed stream.
    """

    report_s: float = 1.0
    stall_s: float = 10.0
    silence_s: float = 15.0


class FrameSource:
    """The frames of an ASGI request's body."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._parser = FrameParser()
        self._held: Iterator[memoryview] | None = None  # what came together with the first

    async def first(self) -> memoryview | None:
        """The first payload; `next` goes on behind it. None: the stream ended before.

        Raises:
            FrameError: the stream is no stream of frames.
        """
        while (payloads := await self.next()) is not None:
            for payload in payloads:
                self._held = payloads
                return payload
        return None

    async def next(self) -> Iterator[memoryview] | None:
        """The payloads that are there next, maybe none yet; None at the stream's end.

        Raises:
            FrameError: also while iterating; the stream is no stream of frames.
        """
        if self._held is not None:
            held, self._held = self._held, None
            return held
        message = await self._receive()
        if message["type"] == "http.disconnect" or (not message.get("more_body") and not message.get("body")):
            return None
        return self._parser.feed(message["body"])


class ServingWorker(Protocol):
    """What a session needs of the worker around it."""

    @property
    def engine(self) -> Engine: ...
    @property
    def block_size(self) -> int:
        """Tokens of a block, for the load events."""
        ...

    @property
    def times(self) -> SessionTimes: ...
    @property
    def is_draining(self) -> bool:
        """New requests are sent elsewhere."""
        ...

    def report(self) -> Report:
        """How the worker is now."""
        ...

    def request_ended(self) -> None:
        """A session has one request less."""
        ...

    def publish(self, event: LoadEvent) -> None:
        """Tells everybody who listens of a request's life. Does not wait."""
        ...


class FrontSession:
    """Serves the requests of one front until either end has enough. Owns them: none outlives `run`.

    Args:
        front_id: the front's name.
        number: unique among this worker's sessions; part of the engine-side request ids.
    """

    def __init__(self, front_id: str, number: int, worker: ServingWorker) -> None:
        self.front_id = front_id
        self._number = number
        self._worker = worker
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._gains: list[Gain] = []
        self._control: list[bytes] = []  # frames that follow the gains
        self._has_unsent = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._report_due = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def report_soon(self) -> None:
        """Sends a report without waiting for its time."""
        self._report_due.set()

    def end(self) -> None:
        """Has `run` end: the worker goes away. The front carries the session's requests on elsewhere."""
        self._ended.set()

    async def run(self, welcome: Welcome, frames: FrameSource, send: Send) -> None:
        """Speaks with the front until it closes the stream, `end` is called, or one of the two breaks a promise."""
        self._put(encode(welcome))
        reason: str | None = None
        is_told = False
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._read(frames, group)),
                    group.create_task(self._write(send)),
                    group.create_task(self._report_regularly()),
                    group.create_task(self._wait_ended()),
                ]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                is_told = tasks[1] not in done
                for task in [*tasks, *self._requests.values()]:
                    task.cancel()
                reason = next((task.result() for task in done if task.exception() is None), None)
        finally:
            self._worker.publish(LoadEvent(kind="front-gone", front_id=self.front_id))
        if reason is not None:
            logger.warning("the session with front %s is cut off: %s", self.front_id, reason)
        if is_told:
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _wait_ended(self) -> None:
        await self._ended.wait()

    async def _read(self, frames: FrameSource, group: asyncio.TaskGroup) -> str | None:
        """Obeys the front; returns None when it has closed the stream, else what it did wrong."""
        while True:
            try:
                async with asyncio.timeout(self._worker.times.silence_s):
                    payloads = await frames.next()
                if payloads is None:
                    return None
                for payload in payloads:
                    self._obey(payload, group)
            except TimeoutError:
                return f"nothing was heard of it for {self._worker.times.silence_s:g} s"
            except (FrameError, msgspec.DecodeError, ValueError) as error:
                return f"it sent what cannot be read: {error}"

    def _obey(self, payload: memoryview, group: asyncio.TaskGroup) -> None:
        match decode_up(payload):
            case Submit() as submit:
                if submit.number in self._requests:
                    raise ValueError(f"request number {submit.number} is used twice")
                # Two fronts may give their requests the same ids.
                request_id = f"{submit.request_id}/{self._number}.{submit.number}"
                request = request_of(submit, request_id, partial(self._offer, submit.number))
                if self._worker.is_draining:
                    self._put(encode(Failed(submit.number, "draining", "the worker is about to leave")))
                else:
                    task = group.create_task(self._serve(submit, request))
                    self._requests[submit.number] = task
                    task.add_done_callback(partial(self._forget, submit.number))
            case Abort(number):
                if (running := self._requests.get(number)) is not None:
                    running.cancel()
            case Ping():
                pass
            case Hello():
                raise ValueError("a second Hello")

    async def _serve(self, submit: Submit, request: GenerationRequest) -> None:
        """Runs one request; the front is told how it ended unless it wanted the end."""
        number = submit.number
        self._tell("added", submit, request)
        try:
            is_first = True
            async with aclosing(self._worker.engine.generate(request)) as steps:
                async for deltas in steps:
                    self._take_in(number, deltas)
                    if is_first:
                        is_first = False
                        self._tell("first-token", submit, request)
                    if not self._has_room.is_set():
                        await self._has_room.wait()
            if is_first or deltas[-1].finish_reason is None:
                self._fail(number, "failed", "the engine ended the request without saying why")
        except ServeError as error:
            self._fail(number, _kind_of(error), str(error))
        except Exception as error:  # root of the request's task: the others go on
            logger.exception("request %s failed", request.request_id)
            self._fail(number, "failed", f"the worker made an error: {error!r}")
        finally:
            self._tell("freed", submit, request)

    def _offer(self, number: int, deltas: list[OutputDelta]) -> bool:
        """A request's `DeltaSink`."""
        if not self._has_room.is_set():
            return False
        self._take_in(number, deltas)
        return True

    def _take_in(self, number: int, deltas: list[OutputDelta]) -> None:
        gains = self._gains
        gains += [gain_of(number, delta) for delta in deltas]
        if len(gains) >= _MAX_GAINS_AHEAD:
            self._has_room.clear()
        self._has_unsent.set()

    def _forget(self, number: int, task: asyncio.Task[None]) -> None:
        del self._requests[number]
        self._worker.request_ended()

    def _fail(self, number: int, kind: FailureKind, message: str) -> None:
        self._put(encode(Failed(number, kind, message)))
        if kind == "overloaded":
            self.report_soon()

    def _tell(self, kind: LoadKind, submit: Submit, request: GenerationRequest) -> None:
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        added = kind == "added"
        self._worker.publish(
            LoadEvent(
                kind=kind,
                front_id=self.front_id,
                request_id=submit.request_id,
                prefill_tokens=num_tokens if added else 0,
                num_blocks=-(-num_tokens // self._worker.block_size) if added else 0,
            )
        )

    def _put(self, payload: bytes) -> None:
        self._control.append(frame(payload))
        self._has_unsent.set()

    async def _write(self, send: Send) -> str:
        """Writes whatever there is, as fast as the front takes it; returns when it takes nothing any more."""
        while True:
            await self._has_unsent.wait()
            self._has_unsent.clear()
            # What this step's other tasks add while the socket is busy leaves with the next write.
            body = b"".join(self._take())
            try:
                async with asyncio.timeout(self._worker.times.stall_s):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            except TimeoutError:
                return f"it has read nothing for {self._worker.times.stall_s:g} s"
            if not self._has_room.is_set() and len(self._gains) < _MAX_GAINS_AHEAD:
                self._has_room.set()

    def _take(self) -> Iterator[bytes]:
        """Frames of all that is unsent. A request's failure comes behind its gains."""
        gains, self._gains = self._gains, []
        control, self._control = self._control, []
        for start in range(0, len(gains), _MAX_GAINS_PER_FRAME):
            yield frame(encode(Step(gains[start : start + _MAX_GAINS_PER_FRAME])))
        yield from control

    async def _report_regularly(self) -> None:
        while True:
            self._put(encode(self._worker.report()))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._worker.times.report_s):
                    await self._report_due.wait()
            self._report_due.clear()


def _kind_of(error: ServeError) -> FailureKind:
    match error:
        case EngineOverloadedError():
            return "overloaded"
        case EngineDeadError():
            return "dead"
        case RequestFailedError():
            return "failed"
    return "failed"
