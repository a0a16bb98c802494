"""A scripted engine behind a real uvicorn server; workers behind real Unix sockets, on the test's own event loop."""

import asyncio
import codecs
import contextlib
import queue
import random
import socket
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import uvicorn

from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.router.config import RouterConfig
from dynamo.router.router import Router
from dynamo.router.waiting import WaitingRoom
from dynamo.router.workers import LoadReport, WorkerCard
from dynamo.serve.admin import CacheAdmin
from dynamo.serve.engine.output_text import OutputText
from dynamo.serve.engine.request import (
    EngineStats,
    GenerationRequest,
    OutputDelta,
    SamplingDefaults,
    SamplingParams,
    TokenLogprob,
)
from dynamo.serve.errors import EngineDeadError, EngineOverloadedError, RequestFailedError
from dynamo.serve.frontend import Frontend
from dynamo.serve.http_server import HttpServer
from dynamo.serve.migration import RoutedEngine
from dynamo.serve.plane.session import WorkerSession
from dynamo.serve.plane.worker_app import WorkerApp
from dynamo.serve.served_model import ServedModel

_START_TIMEOUT_S = 60.0
BLOCK = 4
EOS = 257


class ByteCodec:
    """A tokenizer whose tokens are the bytes of UTF-8; 256 begins a text and 257 ends it."""

    vocab_size = 258

    def encode(self, text: str, *, max_tokens: int) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256

    def apply_chat_template(self, messages: list[dict[str, Any]], *, max_tokens: int) -> list[int]:
        return [256, *"".join(f"{message['role']}: {message['content']}\n" for message in messages).encode()]


@dataclass
class ScriptedEngine:
    """Says `reply` byte by byte, then ends.

    Attributes:
        tokens_per_step: bytes per delta.
        fail_after: raise `failure` after this many deltas; None never.
        stop_reason: of the last delta.
        hold_after: wait for `proceed` after this many deltas; None never.
        live: ids of requests whose generator runs; `ended` maps each to when it was closed.
    """

    reply: str = "Hello, world."
    max_model_len: int = 512
    tokens_per_step: int = 1
    num_cached_tokens: int = 0
    failure: Exception = field(default_factory=lambda: RequestFailedError("the script says so"))
    fail_after: int | None = None
    hold_after: int | None = None
    dead: bool = False
    overloaded: bool = False
    stop_reason: str | int | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    live: set[str] = field(default_factory=set)
    ended: dict[str, float] = field(default_factory=dict)
    proceed: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.live),
            num_waiting=0,
            num_preemptions=0,
            num_steps=0,
            prompt_tokens=0,
            cached_prompt_tokens=0,
            generated_tokens=0,
        )

    def check_healthy(self) -> None:
        if self.dead:
            raise EngineDeadError("the script says so")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        self.check_healthy()
        if self.overloaded:
            raise EngineOverloadedError("the script says so")
        self.requests.append(request)
        self.live.add(request.request_id)
        try:
            for number, delta in enumerate(self._deltas(request)):
                if number == self.fail_after:
                    raise self.failure
                if number == self.hold_after:
                    await self.proceed.wait()
                yield [delta]
                await asyncio.sleep(0)
        finally:
            self.live.discard(request.request_id)
            self.ended[request.request_id] = time.perf_counter()

    def _deltas(self, request: GenerationRequest) -> Iterator[OutputDelta]:
        sampling = request.sampling
        token_ids = list(self.reply.encode())
        whole = len(token_ids) <= sampling.max_tokens
        token_ids = token_ids[: sampling.max_tokens]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for start in range(0, len(token_ids), self.tokens_per_step):
            ids = token_ids[start : start + self.tokens_per_step]
            last = start + self.tokens_per_step >= len(token_ids)
            finish = ("stop" if whole else "length") if last else None
            logprobs = None
            if sampling.num_logprobs is not None:
                top = [(token_id, -0.5 - token_id) for token_id in range(sampling.num_logprobs)]
                logprobs = [TokenLogprob(token_id, -0.25, tuple(top)) for token_id in ids]
            yield OutputDelta(
                text=decoder.decode(bytes(ids), final=last),
                token_ids=ids,
                logprobs=logprobs,
                finish_reason=finish,  # type: ignore[arg-type]
                stop_reason=self.stop_reason if last else None,
                num_cached_tokens=self.num_cached_tokens,
            )


class ThreadedServer(uvicorn.Server):
    """uvicorn in a thread of its own, on a free port of the loopback interface."""

    def __init__(self, engine: ScriptedEngine, **options: Any) -> None:
        self.engine = engine
        served = ServedModel(
            name="scripted",
            codec=ByteCodec(),
            max_model_len=engine.max_model_len,
            defaults=options.pop("defaults", SamplingDefaults()),
        )
        cache = options.pop("cache", None)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._ready: queue.Queue[Frontend] = queue.Queue()
        self.admin = None if cache is None else CacheAdmin(cache, served)
        self._make = lambda: Frontend(engine, served, admin=self.admin, **options)
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        self.frontend = self._ready.get(timeout=_START_TIMEOUT_S)

    def _work(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            frontend = self._make()
            super(ThreadedServer, self).__init__(
                uvicorn.Config(frontend, log_config=None, access_log=False, lifespan="off", ws="none")
            )
            self._ready.put(frontend)
            await self.serve(sockets=[self.socket])

        asyncio.run(serve())

    def call(self, function: Callable[[], object]) -> None:
        """Runs `function` on the server's loop."""
        self.loop.call_soon_threadsafe(function)

    def close(self) -> None:
        self.should_exit = True
        self.force_exit = True
        self._thread.join(_START_TIMEOUT_S)
        if self.admin is not None:
            self.admin.close()
        assert not self._thread.is_alive()
        self.socket.close()


@dataclass
class ScriptedWorker:
    """A worker that knows the whole reply, and says it from where the request stands.

    Attributes:
        failures: per attempt, what happens: after how many deltas, and with which error; none left: it works.
        steps: per attempt, how many tokens each delta has, again and again.
        cached: what it says of the cache.
        hold: waits for `proceed` before its first delta.
    """

    worker_id: str
    failures: list[tuple[int, Exception]] = field(default_factory=list)
    steps: tuple[int, ...] = (1,)
    cached: int = 0
    hold: bool = False
    proceed: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[GenerationRequest] = field(default_factory=list)
    live: int = 0
    reply: ClassVar[str] = "Zwölf Boxkämpfer jagen →Viktor← quer über den Sylter Deich."

    async def close(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        self.requests.append(request)
        num_deltas, error = self.failures.pop(0) if self.failures else (10**9, None)
        self.live += 1
        try:
            if self.hold:
                await self.proceed.wait()
            for number, delta in enumerate(self._deltas(request)):
                if number == num_deltas and error is not None:
                    raise error
                yield [delta]
                await asyncio.sleep(0)
            if error is not None:
                raise error
        finally:
            self.live -= 1

    def _tokens(self, request: GenerationRequest) -> list[int]:
        """What a seeded or greedy engine generates: the reply, or noise of the seed, the same at every worker."""
        reply, seed = [*self.reply.encode(), EOS], request.sampling.seed
        if request.sampling.temperature == 0:
            return reply * 10
        assert seed is not None, "a request that samples must have a seed, or nobody could go on with it"
        rng = random.Random(seed)
        return [rng.choice(reply) for _ in range(600)]

    def _deltas(self, request: GenerationRequest) -> Iterator[OutputDelta]:
        text = OutputText(request, ByteCodec(), eos_token_ids=frozenset([EOS]), max_model_len=10_000)
        ids = self._tokens(request)[len(request.output_token_ids) :]
        step = 0
        while ids:
            delta = OutputDelta(num_cached_tokens=self.cached)
            for token_id in ids[: self.steps[step % len(self.steps)]]:
                certain, delta.finish_reason, delta.stop_reason = text.push(token_id)
                delta.text += certain
                delta.token_ids.append(token_id)
                if delta.finish_reason is not None:
                    break
            ids, step = ids[len(delta.token_ids) :], step + 1
            yield delta
            if delta.finish_reason is not None:
                return


class Workers:
    """A fleet of scripted links."""

    def __init__(self, router: Router, *links: ScriptedWorker) -> None:
        self.router = router
        self.links: dict[str, ScriptedWorker] = {}
        self.pages: dict[str, bytes | None] = {}
        for link in links:
            self.join(link)

    def join(self, link: ScriptedWorker, epoch: int = 1, max_running: int = 0) -> None:
        self.links[link.worker_id] = link
        self.router.join(self.card(link.worker_id, epoch, max_running))

    def card(self, worker_id: str, epoch: int = 1, max_running: int = 0) -> WorkerCard:
        return WorkerCard(
            worker_id=worker_id,
            epoch=epoch,
            model="m",
            fingerprint="00" * 8,
            hash_version=HASH_VERSION,
            block_size=BLOCK,
            max_running=max_running,
            has_events=False,
        )

    def leave(self, worker_id: str) -> None:
        del self.links[worker_id]
        self.router.leave(worker_id)

    def link(self, worker_id: str) -> ScriptedWorker | None:
        return self.links.get(worker_id)

    @property
    def num_ready(self) -> int:
        return len(self.links)

    def totals(self) -> EngineStats:
        return EngineStats(
            num_running=sum(link.live for link in self.links.values()),
            num_waiting=0,
            num_preemptions=0,
            num_steps=0,
            prompt_tokens=0,
            cached_prompt_tokens=0,
            generated_tokens=0,
        )

    async def metrics(self) -> dict[str, bytes | None]:
        return self.pages

    async def start(self) -> None: ...

    async def close(self) -> None: ...


class House:
    """Everything of one test."""

    def __init__(
        self,
        *links: ScriptedWorker,
        limit: int = 3,
        wait_s: float = 0.3,
        clock: Callable[[], float] = time.monotonic,
        **config: Any,
    ) -> None:
        self.router = Router(RouterConfig(**config), clock=clock, rng=random.Random(1))
        self.workers = Workers(self.router, *links)
        self.room = WaitingRoom(self.router)
        self.engine = RoutedEngine(
            self.workers,
            self.router,
            self.room,
            max_model_len=10_000,
            block_size=BLOCK,
            migration_limit=limit,
            no_worker_timeout_s=wait_s,
            rng=random.Random(2),
        )

    async def collect(self, request: GenerationRequest) -> list[OutputDelta]:
        taken: list[OutputDelta] = []
        await self.collect_into(request, taken)
        return taken

    async def collect_into(self, request: GenerationRequest, taken: list[OutputDelta]) -> None:
        async with aclosing(self.engine.generate(request)) as gains:
            async for deltas in gains:
                taken += deltas

    def check_nothing_is_left(self) -> None:
        assert self.router.stats().num_bookings == 0
        assert all(link.live == 0 for link in self.workers.links.values())
        self.router.check_invariants()


@pytest.fixture
def codec() -> ByteCodec:
    return ByteCodec()


@pytest.fixture
def worker() -> type[ScriptedWorker]:
    """The class of workers that fail where a test wants."""
    return ScriptedWorker


@pytest.fixture
def house() -> type[House]:
    """The class of fronts over such workers."""
    return House


@pytest.fixture
def scripted() -> type[ScriptedEngine]:
    """The class of engines that say what a test wants."""
    return ScriptedEngine


@pytest.fixture
def serve() -> Iterator[Callable[..., ThreadedServer]]:
    """Starts servers over scripted engines: `serve(engine, api_key=...)`; with `cache=...`, that is administered."""
    servers: list[ThreadedServer] = []

    def start(engine: ScriptedEngine | None = None, **options: Any) -> ThreadedServer:
        servers.append(ThreadedServer(engine or ScriptedEngine(), **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def run() -> Callable[[Any], Any]:
    """Runs a coroutine to its end, within ten seconds."""

    def run_coroutine(coroutine: Any) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(10):
                return await coroutine

        return asyncio.run(bounded())

    return run_coroutine


# --- workers on the test's own event loop

CARD = WorkerCard(worker_id="worker-0", epoch=7, model="demo", fingerprint="00" * 8, hash_version=1, block_size=16)
REPORT = LoadReport(num_running=3, num_waiting=1, prefill_tokens_waiting=5, used_blocks={"device": 9})


@asynccontextmanager
async def serve_asgi(app: Any, path: Path | None) -> AsyncIterator[str]:
    """On a Unix socket, or a free loopback port if `path` is None."""
    uds = None if path is None else str(path)
    config = uvicorn.Config(
        app, uds=uds, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = HttpServer(config)
    with contextlib.ExitStack() as stack:
        sockets, address = None, f"unix:{path}"
        if path is None:
            sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))]
            address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        task = asyncio.create_task(server.serve(sockets))
        await server.listening.wait()
        try:
            yield address
        finally:
            server.should_exit = True
            server.force_exit = True
            await task


class Plane:
    """Makes workers and sessions with them; all of it ends with the test's `async with`."""

    card = CARD
    report = REPORT

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._num_sockets = 0

    def asgi(self, app: Any, path: str | None = None) -> AbstractAsyncContextManager[str]:
        """Serves an ASGI application, on a socket of its own unless told which; gives its address."""
        self._num_sockets += 1
        return serve_asgi(app, Path(path or self.folder / f"{self._num_sockets}.sock"))

    @asynccontextmanager
    async def worker(
        self, engine: Any, *, on_port: bool = False, **options: Any
    ) -> AsyncIterator[tuple[WorkerApp, str]]:
        """A worker over an engine, on a Unix socket or a port; gives the application and its address."""
        app = WorkerApp(engine, CARD, report=lambda: REPORT, **options)
        async with serve_asgi(app, None) if on_port else self.asgi(app) as address:
            try:
                yield app, address
            finally:
                await app.close()

    @asynccontextmanager
    async def session(self, address: str, **options: Any) -> AsyncIterator[WorkerSession]:
        wanted = {"worker_id": CARD.worker_id, "epoch": CARD.epoch, "front_id": "front-a", **options}
        session = await WorkerSession.connect(address, **wanted)
        try:
            yield session
        finally:
            await session.close()

    @staticmethod
    def request(request_id: str = "r", *, max_tokens: int = 100, **fields: Any) -> GenerationRequest:
        wanted = {"prompt_token_ids": [1, 2, 3], "sampling": SamplingParams(max_tokens=max_tokens), **fields}
        return GenerationRequest(request_id=request_id, **wanted)

    @staticmethod
    async def collect(link: Any, request: GenerationRequest) -> list[OutputDelta]:
        return [delta async for deltas in link.generate(request) for delta in deltas]

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        """Waits on the event loop for a condition that no event tells of; the test's own time limit bounds it."""
        while not condition():  # noqa: ASYNC110  # what is waited for is another's state
            await asyncio.sleep(0.002)


@pytest.fixture
def plane() -> Iterator[Plane]:
    # Not `tmp_path`: the path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dynamo-") as folder:
        yield Plane(Path(folder))
