"""Streams written outside of tasks: in order, without waiting while the client reads, and without loss when it does not."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from dynamo.serve.outlet import Outlet, WriteRound


class Client:
    """The server's end of one: `send` waits, as uvicorn's does, while it does not read."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.error: Exception | None = None

    async def send(self, message: Any) -> None:
        if not self.reads.is_set():
            await self.reads.wait()
        if self.error is not None:
            raise self.error
        self.received.append(message["body"])


def body(content: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": True}


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(limited())


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_streams_are_written_after_the_callback_that_filled_them_each_once() -> None:
    async def main() -> None:
        writing, clients = WriteRound(), [Client() for _ in range(3)]
        outlets = [Outlet(client.send, writing) for client in clients]
        for content in (b"a", b"b"):
            for outlet in outlets:
                outlet.write(content)
        assert [client.received for client in clients] == [[], [], []]
        await asyncio.sleep(0)
        assert [client.received for client in clients] == [[b"ab"], [b"ab"], [b"ab"]]
        assert len(asyncio.all_tasks()) == 1

    run(main())


def test_what_is_sent_comes_behind_what_was_written() -> None:
    async def main() -> None:
        client = Client()
        outlet = Outlet(client.send, WriteRound())
        outlet.write(b"a")
        await outlet.send(body(b"b"))
        await settled()
        assert client.received == [b"a", b"b"]

    run(main())


def test_a_client_that_does_not_read_closes_the_outlet_and_loses_nothing() -> None:
    async def main() -> None:
        client = Client()
        outlet = Outlet(client.send, WriteRound())
        client.reads.clear()
        outlet.write(b"a")
        await settled()
        assert not outlet.is_free
        assert client.received == []
        sending = asyncio.create_task(outlet.send(body(b"b")))
        await settled()
        assert not sending.done()
        client.reads.set()
        await sending
        assert client.received == [b"a", b"b"]
        assert outlet.is_free

    run(main())


def test_what_waits_goes_by_itself_as_soon_as_the_client_reads() -> None:
    async def main() -> None:
        client = Client()
        outlet = Outlet(client.send, WriteRound())
        client.reads.clear()
        outlet.write(b"a")
        await settled()
        client.reads.set()
        await settled()
        assert client.received == [b"a"]
        assert outlet.is_free

    run(main())


@pytest.mark.parametrize("reads", [True, False])
def test_an_error_of_the_server_is_raised_where_the_answer_is_written(reads: bool) -> None:
    async def main() -> None:
        writing, client, other = WriteRound(), Client(), Client()
        outlet, next_one = Outlet(client.send, writing), Outlet(other.send, writing)
        client.error = OSError("gone")
        if not reads:
            client.reads.clear()
        outlet.write(b"a")
        next_one.write(b"a")
        await settled()
        client.reads.set()
        await settled()
        assert not outlet.is_free
        assert other.received == [b"a"]
        with pytest.raises(OSError, match="gone"):
            await outlet.send(body(b"b"))

    run(main())


def test_closing_gives_up_what_waits() -> None:
    async def main() -> None:
        client = Client()
        outlet = Outlet(client.send, WriteRound())
        client.reads.clear()
        outlet.write(b"a")
        await settled()
        await outlet.close()
        client.reads.set()
        await settled()
        assert client.received == []
        assert len(asyncio.all_tasks()) == 1

    run(main())
