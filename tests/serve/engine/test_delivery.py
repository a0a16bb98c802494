"""Streams that hold deltas back: the first come at once, later ones together, the end never waits."""

import asyncio

import pytest

from dynamo.serve.engine.delivery import MAX_QUEUED_DELTAS, OutputStream
from dynamo.serve.engine.request import OutputDelta
from dynamo.serve.errors import RequestFailedError

LONG_S = 3600.0


def delta(number: int, *, last: bool = False) -> OutputDelta:
    return OutputDelta(str(number), [number], finish_reason="stop" if last else None)


def numbers(deltas: list[OutputDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


async def settled() -> None:
    """Lets everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_first_deltas_are_not_held_back() -> None:
    async def main() -> None:
        stream = OutputStream(LONG_S)
        stream.feed(delta(1))
        assert numbers(await stream.next()) == [1]

    asyncio.run(main())


def test_what_comes_within_the_interval_is_handed_over_together() -> None:
    async def main() -> None:
        stream = OutputStream(0.3)
        stream.feed(delta(1))
        await stream.next()
        began = asyncio.get_running_loop().time()
        taking = asyncio.create_task(stream.next())
        for number in (2, 3, 4):
            await settled()
            stream.feed(delta(number))
            assert not taking.done()
        assert numbers(await taking) == [2, 3, 4]
        assert asyncio.get_running_loop().time() - began >= 0.2

    asyncio.run(main())


def test_what_comes_after_the_interval_is_handed_over_at_once() -> None:
    async def main() -> None:
        stream = OutputStream(1e-9)
        for number in range(5):
            await asyncio.sleep(0.001)
            stream.feed(delta(number))
            assert numbers(await stream.next()) == [number]

    asyncio.run(main())


@pytest.mark.parametrize("comes_before", [True, False])
def test_the_end_is_not_held_back(comes_before: bool) -> None:
    async def main() -> None:
        stream = OutputStream(LONG_S)
        stream.feed(delta(1))
        await stream.next()
        stream.feed(delta(2))
        if comes_before:
            stream.feed(delta(3, last=True))
        taking = asyncio.create_task(stream.next())
        await settled()
        if not comes_before:
            assert not taking.done()
            stream.feed(delta(3, last=True))
        assert numbers(await asyncio.wait_for(taking, 10)) == [2, 3]

    asyncio.run(main())


def test_an_error_is_not_held_back_and_comes_after_what_was_there() -> None:
    async def main() -> None:
        stream = OutputStream(LONG_S)
        stream.feed(delta(1))
        await stream.next()
        stream.feed(delta(2))
        taking = asyncio.create_task(stream.next())
        await settled()
        stream.fail(RequestFailedError("gone"))
        assert numbers(await asyncio.wait_for(taking, 10)) == [2]
        with pytest.raises(RequestFailedError, match="gone"):
            await stream.next()

    asyncio.run(main())


def test_the_end_wakes_a_consumer_whose_queue_is_full() -> None:
    async def main() -> None:
        stream = OutputStream(LONG_S)
        stream.feed(delta(0))
        await stream.next()
        stream.feed(delta(1))
        taking = asyncio.create_task(stream.next())
        await settled()
        for number in range(2, MAX_QUEUED_DELTAS + 10):
            stream.feed(delta(number))
        assert not taking.done()
        stream.feed(delta(MAX_QUEUED_DELTAS + 10, last=True))
        assert numbers(await asyncio.wait_for(taking, 10)) == list(range(1, MAX_QUEUED_DELTAS + 11))

    asyncio.run(main())


def test_a_consumer_that_gives_up_leaves_what_was_held_back() -> None:
    async def main() -> None:
        stream = OutputStream(LONG_S)
        stream.feed(delta(1))
        await stream.next()
        stream.feed(delta(2))
        taking = asyncio.create_task(stream.next())
        await settled()
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        stream.feed(delta(3, last=True))
        assert numbers(await asyncio.wait_for(stream.next(), 10)) == [2, 3]

    asyncio.run(main())
