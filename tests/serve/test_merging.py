import asyncio
from typing import Any

import pytest

from dynamo.serve.engine.request import GenerationRequest, SamplingParams
from dynamo.serve.errors import RequestFailedError
from dynamo.serve.merging import Batch, generate_all


def request(number: int) -> GenerationRequest:
    return GenerationRequest(request_id=f"r{number}", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=100))


@pytest.mark.parametrize("num_requests", [1, 5])
def test_every_sequence_is_run_to_its_end(run: Any, scripted: Any, num_requests: int) -> None:
    engine = scripted(reply="some text")
    texts = [""] * num_requests

    async def collect(batch: Batch) -> None:
        for index, delta in batch:
            texts[index] += delta.text

    run(generate_all(engine, [request(number) for number in range(num_requests)], collect))
    assert texts == ["some text"] * num_requests
    assert not engine.live


def test_what_several_sequences_gain_in_one_step_comes_as_one_batch(run: Any, scripted: Any) -> None:
    sizes: list[int] = []

    async def collect(batch: Batch) -> None:
        sizes.append(len(batch))

    run(generate_all(scripted(reply="abc"), [request(number) for number in range(4)], collect))
    assert sizes == [4, 4, 4]


@pytest.mark.parametrize("num_requests", [1, 5])
def test_the_first_failure_ends_all_sequences(run: Any, scripted: Any, num_requests: int) -> None:
    engine = scripted(reply="some text", fail_after=3)

    async def collect(batch: Batch) -> None: ...

    with pytest.raises(RequestFailedError, match="the script says so"):
        run(generate_all(engine, [request(number) for number in range(num_requests)], collect))
    assert not engine.live


def test_a_sequence_that_ends_without_a_reason_is_a_failure(run: Any, scripted: Any) -> None:
    async def collect(batch: Batch) -> None: ...

    with pytest.raises(RequestFailedError, match="without saying why"):
        run(generate_all(scripted(reply=""), [request(0)], collect))


@pytest.mark.parametrize("num_requests", [1, 5])
def test_a_busy_consumer_holds_the_sequences_back(run: Any, scripted: Any, num_requests: int) -> None:
    async def scenario() -> None:
        engine = scripted(reply="x" * 1000)
        batches: list[Batch] = []
        writable = asyncio.Event()

        async def write(batch: Batch) -> None:
            batches.append(batch)
            await writable.wait()

        work = asyncio.create_task(generate_all(engine, [request(number) for number in range(num_requests)], write))
        for _ in range(1000):
            await asyncio.sleep(0)
        assert len(batches) == 1
        assert sum(len(delta.token_ids) for _, delta in batches[0]) == num_requests
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert not engine.live

    run(scenario())
