import asyncio
from typing import Any

import pytest

from dynamo.serve.interruption import ClientDisconnectedError, Interruption, run_interruptible


def test_a_client_that_leaves_cancels_the_work_and_only_then_is_told(run: Any) -> None:
    async def scenario() -> None:
        cleaned = False

        async def work() -> None:
            nonlocal cleaned
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned = True

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        with pytest.raises(ClientDisconnectedError):
            await run_interruptible(work(), receive, Interruption())
        assert cleaned
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(scenario())


def test_an_interruption_ends_running_and_later_work(run: Any) -> None:
    async def scenario() -> None:
        interruption = Interruption()

        async def never() -> dict[str, str]:
            await asyncio.Event().wait()
            raise AssertionError

        async def work() -> None:
            await asyncio.Event().wait()

        running = asyncio.create_task(run_interruptible(work(), never, interruption))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        interruption.trigger(RuntimeError("over"))
        with pytest.raises(RuntimeError, match="over"):
            await running
        with pytest.raises(RuntimeError, match="over"):
            await run_interruptible(work(), never, interruption)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(scenario())


def test_results_and_failures_of_the_work_pass_through(run: Any) -> None:
    async def never() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    async def answer() -> int:
        return 42

    async def fail() -> int:
        raise LookupError("gone")

    assert run(run_interruptible(answer(), never, Interruption())) == 42
    with pytest.raises(LookupError, match="gone"):
        run(run_interruptible(fail(), never, Interruption()))


def test_guarded_work_ends_when_triggered_and_else_gives_its_result(run: Any) -> None:
    async def scenario() -> None:
        interruption = Interruption()

        async def answer() -> int:
            return 42

        async def work() -> None:
            await asyncio.Event().wait()

        assert await interruption.guard(answer()) == 42
        running = asyncio.create_task(interruption.guard(work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        interruption.trigger(RuntimeError("over"))
        with pytest.raises(RuntimeError, match="over"):
            await running
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(scenario())
