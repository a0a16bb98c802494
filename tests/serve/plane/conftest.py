"""Workers behind real Unix sockets, on the test's own event loop."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from dynamo.router.workers import LoadReport, WorkerCard
from dynamo.serve.engine.request import GenerationRequest, OutputDelta, SamplingParams
from dynamo.serve.plane.session import WorkerSession
from dynamo.serve.plane.worker_app import WorkerApp

CARD = WorkerCard(worker_id="worker-0", epoch=7, model="demo", fingerprint="00" * 8, hash_version=1, block_size=16)
REPORT = LoadReport(num_running=3, num_waiting=1, prefill_tokens_waiting=5, used_blocks={"device": 9})


class QuietServer(uvicorn.Server):
    """uvicorn without signal handlers, and with an event for when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@asynccontextmanager
async def serve_asgi(app: Any, path: Path) -> AsyncIterator[str]:
    config = uvicorn.Config(
        app, uds=str(path), http="httptools", ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = QuietServer(config)
    task = asyncio.create_task(server.serve())
    await server.listening.wait()
    try:
        yield f"unix:{path}"
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

    def asgi(self, app: Any) -> AbstractAsyncContextManager[str]:
        """Serves an ASGI application; gives its address."""
        self._num_sockets += 1
        return serve_asgi(app, self.folder / f"{self._num_sockets}.sock")

    @asynccontextmanager
    async def worker(self, engine: Any, **options: Any) -> AsyncIterator[tuple[WorkerApp, str]]:
        """A worker over an engine; gives the application and its address."""
        app = WorkerApp(engine, CARD, report=lambda: REPORT, **options)
        async with self.asgi(app) as address:
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
