"""A worker can be reached for as long as its name is its own, whatever is removed and whatever goes wrong."""

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dynamo.serve import worker_socket
from dynamo.serve.worker_claim import WorkerClaim
from dynamo.serve.worker_socket import reachable


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def answers(path: str) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    is_well = await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    writer.close()
    return is_well


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(8):
        while not condition():  # noqa: ASYNC110  # what is waited for is another's state
            await asyncio.sleep(0.005)


def test_it_is_made_anew_with_its_folder(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        with WorkerClaim.take(tmp_path / "fleet", "w") as claim:
            async with reachable(app, claim, pytest.fail, look_s=0.01):
                path = claim.socket_path("http")
                assert await answers(path)
                for _ in range(2):
                    shutil.rmtree(tmp_path / "fleet")
                    await until(Path(path).exists)
                    await until(lambda: "made anew" in caplog.text)
                    caplog.clear()
                    assert await answers(path)
            assert not await answers(path)

    run(work())


def test_it_is_left_to_another_worker_that_has_the_name_by_now(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        lost: list[bool] = []
        with WorkerClaim.take(tmp_path / "fleet", None) as slow:
            async with reachable(app, slow, lambda: lost.append(True), look_s=0.01):
                shutil.rmtree(tmp_path / "fleet")
                with WorkerClaim.take(tmp_path / "fleet", None) as fast:
                    await until(lambda: bool(lost))
                    assert list(fast.folder.iterdir()) == []
        assert lost == [True]

    run(work())
    assert caplog.text.count("the name worker-0 is another worker's") == 1


def test_an_unforeseen_error_is_told_once_and_another_attempt_made(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_failures = 0
    serving = worker_socket.serving  # type: ignore[attr-defined]

    @asynccontextmanager
    async def failing(app: Any, listener: socket.socket) -> AsyncIterator[None]:
        nonlocal num_failures
        num_failures += 1
        raise RuntimeError("what nobody foresaw")
        yield

    async def work() -> None:
        with WorkerClaim.take(tmp_path, "w") as claim:
            path = Path(claim.socket_path("http"))
            async with reachable(app, claim, pytest.fail, look_s=0.01):
                monkeypatch.setattr(worker_socket, "serving", failing)
                os.unlink(path)
                await until(lambda: num_failures == 3)
                monkeypatch.setattr(worker_socket, "serving", serving)
                await until(lambda: "made anew" in caplog.text)
                assert await answers(str(path))

    run(work())
    assert caplog.text.count("fronts cannot reach w: what nobody foresaw") == 1
