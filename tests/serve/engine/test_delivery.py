"""Streams that hold deltas back, or hand them to a sink: all arrive, once and in order, and neither first nor last waits."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


class Sink:
    """Takes deltas while it is `open`."""

    def __init__(self) -> None:
        self.open = True
        self.offers: list[list[int]] = []
        self.offered = asyncio.Event()

    def __call__(self, deltas: list[OutputDelta]) -> bool:
        if self.open:
            self.offers.append(numbers(deltas))
            self.offered.set()
        return self.open


def test_a_sink_takes_what_comes_between_the_first_delta_and_the_last() -> None:
    async def main() -> None:
        sink = Sink()
        stream = OutputStream(sink=sink)
        taking = asyncio.create_task(stream.next())
        await settled()
        stream.feed(delta(1))
        assert numbers(await taking) == [1]
        taking = asyncio.create_task(stream.next())
        await settled()
        stream.feed(delta(2))
        stream.feed(delta(3))
        assert sink.offers == [[2], [3]]
        await settled()
        assert not taking.done()
        stream.feed(delta(4, last=True))
        assert numbers(await taking) == [4]
        assert sink.offers == [[2], [3]]

    asyncio.run(main())


def test_what_a_sink_refuses_goes_to_the_consumer_with_what_follows() -> None:
    async def main() -> None:
        sink = Sink()
        stream = OutputStream(sink=sink)
        stream.feed(delta(1))
        await stream.next()
        taking = asyncio.create_task(stream.next())
        await settled()
        sink.open = False
        stream.feed(delta(2))
        sink.open = True
        stream.feed(delta(3))  # the consumer's turn has come, though it has not run yet
        assert numbers(await taking) == [2, 3]
        stream.feed(delta(4))  # the consumer is busy
        assert sink.offers == []
        assert numbers(await stream.next()) == [4]

    asyncio.run(main())


def test_what_was_held_back_goes_to_the_sink_together() -> None:
    async def main() -> None:
        sink = Sink()
        stream = OutputStream(0.02, sink)
        stream.feed(delta(1))
        await stream.next()
        taking = asyncio.create_task(stream.next())
        await settled()
        for number in (2, 3, 4):
            stream.feed(delta(number))
        assert sink.offers == []
        await asyncio.wait_for(sink.offered.wait(), 10)
        assert sink.offers == [[2, 3, 4]]
        stream.feed(delta(5, last=True))
        assert numbers(await asyncio.wait_for(taking, 10)) == [5]

    asyncio.run(main())


def test_a_cancelled_consumers_sink_is_offered_nothing() -> None:
    async def main() -> None:
        sink = Sink()
        stream = OutputStream(sink=sink)
        stream.feed(delta(1))
        await stream.next()
        taking = asyncio.create_task(stream.next())
        await settled()
        taking.cancel()
        stream.feed(delta(2))
        await asyncio.gather(taking, return_exceptions=True)
        stream.feed(delta(3))
        assert sink.offers == []

    asyncio.run(main())


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["feed", "feed", "turn", "refuse", "accept", "block", "free"]), max_size=60),
    st.sampled_from([0.0, LONG_S]),
    st.booleans(),
)
def test_every_delta_arrives_once_and_in_order(script: list[str], hold_s: float, fails: bool) -> None:
    async def main() -> None:
        arrived: list[int] = []
        accepts, may_go = True, asyncio.Event()
        may_go.set()

        def sink(deltas: list[OutputDelta]) -> bool:
            if accepts:
                arrived.extend(numbers(deltas))
            return accepts

        stream = OutputStream(hold_s, sink)

        async def consume() -> None:
            is_over = False
            while not is_over:
                deltas = await stream.next()
                await may_go.wait()
                arrived.extend(numbers(deltas))
                is_over = deltas[-1].finish_reason is not None

        consumer = asyncio.create_task(consume())
        number = 0
        for action in script:
            match action:
                case "feed":
                    stream.feed(delta(number))
                    number += 1
                case "turn":
                    await asyncio.sleep(0)
                case "refuse" | "accept":
                    accepts = action == "accept"
                case "block":
                    may_go.clear()
                case "free":
                    may_go.set()
        may_go.set()
        if fails:
            stream.fail(RequestFailedError("gone"))
            with pytest.raises(RequestFailedError):
                await asyncio.wait_for(consumer, 10)
        else:
            stream.feed(delta(number, last=True))
            number += 1
            await asyncio.wait_for(consumer, 10)
        assert arrived == list(range(number))

    asyncio.run(main())
