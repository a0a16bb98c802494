"""Requests over workers that fail: a real router, and links that do what a script says."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.serve.engine.request import (
    GenerationRequest,
    Journey,
    OutputDelta,
    RoutingHints,
    SamplingParams,
)
from dynamo.serve.errors import (
    EngineDeadError,
    EngineOverloadedError,
    NoWorkerError,
    RequestError,
    RequestFailedError,
    WorkerDrainingError,
    WorkerLostError,
)
from dynamo.serve.live_request import LiveRequest

EOS = 257


def ask(*, temperature: float = 0.0, routing: RoutingHints | None = None, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3, 4, 5, 6, 7, 8, 9],
        sampling=SamplingParams(max_tokens=sampling.pop("max_tokens", 500), temperature=temperature, **sampling),
        routing=routing or RoutingHints(),
        journey=Journey(),
    )


def told(deltas: list[OutputDelta]) -> tuple[str, list[int], Any, Any, set[int]]:
    """What the client sees of it."""
    return (
        "".join(delta.text for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
        deltas[-1].finish_reason,
        deltas[-1].stop_reason,
        {delta.num_cached_tokens for delta in deltas},
    )


def lost(worker_id: str = "x") -> WorkerLostError:
    return WorkerLostError(worker_id, "the script says so")


FAILURES = st.tuples(
    st.integers(0, 70),
    st.sampled_from(
        [lost(), EngineDeadError("dead"), EngineOverloadedError("full"), WorkerDrainingError("x", "leaves")]
    ),
)


@given(
    failures=st.lists(FAILURES, max_size=3),
    steps=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    sampling=st.fixed_dictionaries(
        {},
        optional={
            "stop": st.sampled_from([("k\u00e4m",), ("en →V", "zzz"), ("er ü", "r über den"), ("Deich.x",)]),
            "max_tokens": st.integers(1, 64),
            "min_tokens": st.integers(0, 30),
            "seed": st.integers(0, 9),
            "temperature": st.sampled_from([0.0, 0.7]),
            "ignore_eos": st.booleans(),
        },
    ),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_workers_fail_the_client_sees_what_one_that_does_not_would_say(
    worker: Any, house: Any, failures: list[tuple[int, Exception]], steps: list[int], sampling: dict[str, Any]
) -> None:
    sampling = {"max_tokens": 40, **sampling}
    sampling["min_tokens"] = min(sampling.get("min_tokens", 0), sampling["max_tokens"])
    request = ask(**sampling)

    async def work(links: list[Any]) -> list[OutputDelta]:
        front = house(*links)
        deltas = await front.collect(request)
        front.check_nothing_is_left()
        migrations = front.engine.migrations
        assert migrations.detected.total() <= 3
        assert migrations.exhausted.total() == 0
        return deltas

    whole = asyncio.run(work([worker("alone", cached=3)]))
    plan = [worker(f"w{number}", [failure], tuple(steps), 3) for number, failure in enumerate(failures)]
    carried = asyncio.run(work([*plan, worker("last", steps=tuple(steps), cached=3)]))
    assert told(carried) == told(whole)


@pytest.mark.parametrize("after", [0, 1, 20])
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_original_error_comes_after_the_last_attempt(
    run: Any, worker: Any, house: Any, after: int, limit: int
) -> None:
    links = [worker(f"w{number}", [(after, lost(f"w{number}"))] * 9) for number in range(5)]
    taken: list[OutputDelta] = []

    async def work() -> None:
        front = house(*links, limit=limit)
        with pytest.raises(WorkerLostError, match="the script says so"):
            await front.collect_into(ask(), taken)
        front.check_nothing_is_left()
        phases = ["new" if after == 0 else "ongoing"] * (limit + 1)
        assert list(front.engine.migrations.detected.elements()) == phases
        assert front.engine.migrations.exhausted.total() == 1
        assert front.engine.migrations.succeeded.total() == (limit if after else 0)

    run(work())
    assert sum(len(link.requests) for link in links) == limit + 1
    assert all(delta.finish_reason is None for delta in taken)
    assert len(taken) == after * (limit + 1)


def test_each_attempt_has_an_id_of_its_own_and_what_the_client_has(run: Any, worker: Any, house: Any) -> None:
    links = [worker(name, [(3, lost(name))]) for name in "abc"]
    last = worker("d")

    async def work() -> None:
        front = house(*links, last)
        request = ask()
        await front.collect(request)
        attempts = sorted(
            (one for link in front.workers.links.values() for one in link.requests), key=lambda one: one.request_id
        )
        ids = [one.request_id for one in attempts]
        assert ids == [f"r#{number}" for number in range(1, len(ids) + 1)] and len(ids) > 1
        for number, attempt in enumerate(attempts):
            assert attempt.output_token_ids == list(worker.reply.encode())[: 3 * number]
            assert attempt.prompt_token_ids == request.prompt_token_ids
            assert attempt.sampling == request.sampling
        assert request.journey is not None and request.journey.num_attempts == len(ids)

    run(work())


def test_a_request_that_samples_without_a_seed_gets_one_and_others_keep_theirs(
    run: Any, worker: Any, house: Any
) -> None:
    async def seeds(**sampling: Any) -> list[int | None]:
        links = [worker("a", [(2, lost())] * 2), worker("b")]
        front = house(*links)
        for _ in range(2):
            await front.collect(ask(max_tokens=9, **sampling))
        return [one.sampling.seed for link in links for one in link.requests]

    assert set(run(seeds())) == {None}
    assert set(run(seeds(temperature=1.0, seed=5))) == {5}
    given = run(seeds(temperature=1.0))
    assert len(set(given)) == 2, "two requests, each with one seed for all its attempts"
    assert None not in given


def test_a_failed_worker_is_set_aside_and_its_load_freed_before_the_next_choice(
    run: Any, worker: Any, house: Any
) -> None:
    async def work() -> None:
        failing = [worker(name, [(4, lost(name))]) for name in "ab"]
        front = house(*failing, worker("c"), mode="round-robin")
        bookings: list[int] = []

        class Spying(worker):
            async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
                bookings.append(front.router.stats().num_bookings)
                async with aclosing(super().generate(request)) as gains:
                    async for deltas in gains:
                        yield deltas

        for link in [*front.workers.links.values()]:
            front.workers.links[link.worker_id] = Spying(link.worker_id, link.failures)
        await front.collect(ask())
        assert bookings == [1, 1, 1]
        assert {w.worker_id for w in front.router.stats().workers if w.is_set_aside} == {"a", "b"}

    run(work())


@pytest.mark.parametrize("error", [EngineOverloadedError("full"), WorkerDrainingError("x", "leaves")])
def test_a_worker_without_room_is_passed_over_and_keeps_its_good_name(
    run: Any, worker: Any, house: Any, error: Exception
) -> None:
    async def work() -> None:
        refusing = [worker(f"w{number}", [(0, error)]) for number in range(6)]
        front = house(*refusing, worker("last"), limit=0, mode="round-robin")
        assert told(await front.collect(ask()))[1][-1] == EOS
        assert not any(worker.is_set_aside for worker in front.router.stats().workers)
        assert front.engine.migrations.refused.total() == 6
        assert front.engine.migrations.detected.total() == 0

    run(work())


def test_overload_everywhere_is_told_as_such(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        front = house(*(worker(name, [(0, EngineOverloadedError("full"))]) for name in "abc"))
        with pytest.raises(EngineOverloadedError):
            await front.collect(ask())
        front.check_nothing_is_left()

    run(work())


def test_a_stream_that_was_begun_outlasts_a_moment_of_overload(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        full = EngineOverloadedError("full")
        front = house(
            worker("a", [(5, lost("a"))]), worker("b", [(0, full), (0, full)]), mode="round-robin", wait_s=5.0
        )
        request = asyncio.create_task(front.collect(ask()))
        while len(front.workers.links["b"].requests) < 2:
            await asyncio.sleep(0)
            front.router.tick()  # as reports of the workers do
        assert told(await request)[1][-1] == EOS

    run(work())


def test_an_error_of_the_request_itself_is_not_tried_elsewhere(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        bad = RequestFailedError("bad")
        links = [worker(name, [(2, bad)] * 9) for name in "ab"]
        front = house(*links)
        with pytest.raises(RequestFailedError, match="bad"):
            await front.collect(ask())
        assert sum(len(link.requests) for link in links) == 1
        assert not any(worker.is_set_aside for worker in front.router.stats().workers)
        front.check_nothing_is_left()

    run(work())


def test_a_stream_without_an_end_is_a_lost_one(run: Any, worker: Any, house: Any) -> None:
    class Short(worker):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
            yield [OutputDelta("Z", [ord("Z")])]

    async def work() -> None:
        front = house(Short("a"), worker("b"), mode="round-robin")
        assert told(await front.collect(ask()))[0] == worker.reply
        assert front.engine.migrations.succeeded["ongoing"] == 1

    run(work())


def test_the_log_has_a_line_for_each_lost_worker_and_not_for_each_request(
    run: Any, worker: Any, house: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        front = house(worker("a", [(1, lost("a"))] * 30), worker("b"), limit=1)
        pinned = ask(routing=RoutingHints(worker="a"))
        asked = [front.collect(ask()) for _ in range(20)] + [front.collect(pinned) for _ in range(3)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(answer, RequestError) for answer in answers) == 3
        assert not caplog.records
        await front.engine.stop()
        num_lost = front.engine.migrations.detected.total()
        assert num_lost > 10
        assert [record.getMessage() for record in caplog.records] == [
            f"requests of worker a that go on elsewhere: {num_lost - 3}; worker a is lost: the script says so",
            "requests of worker a that are given up: 3; worker a is lost: the script says so",
        ]
        front = house(worker("a", [(1, lost("a"))]), worker("b"))
        while not front.engine.migrations.detected:
            await front.collect(ask())
        await asyncio.to_thread(eventually, lambda: "that go on elsewhere: 1; worker" in caplog.text)

    with caplog.at_level(logging.WARNING):
        run(work())


@pytest.mark.parametrize("after", [0, 3])
def test_a_pinned_request_is_not_carried_on(run: Any, worker: Any, house: Any, after: int) -> None:
    async def work() -> None:
        other = worker("b")
        front = house(worker("a", [(after, lost("a"))]), other)
        with pytest.raises(RequestError, match="asked for no other") as refused:
            await front.collect(ask(routing=RoutingHints(worker="a")))
        assert (refused.value.status, refused.value.code) == (503, "pinned_worker_lost")
        assert other.requests == []
        front.check_nothing_is_left()

    run(work())


def test_a_pin_and_an_exclusion_are_obeyed(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        links = {name: worker(name) for name in "abc"}
        front = house(*links.values())
        for _ in range(4):
            await front.collect(ask(routing=RoutingHints(worker="b")))
            await front.collect(ask(routing=RoutingHints(exclude=frozenset("ab"))))
        assert [len(link.requests) for link in links.values()] == [0, 4, 4]

    run(work())


def test_a_pin_to_nobody_and_to_one_that_is_full_are_told_apart(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        front = house(worker("a", [(0, EngineOverloadedError("full"))]), worker("b"))
        with pytest.raises(RequestError) as refused:
            await front.collect(ask(routing=RoutingHints(worker="z")))
        assert (refused.value.status, refused.value.code) == (404, "worker_not_found")
        with pytest.raises(EngineOverloadedError):
            await front.collect(ask(routing=RoutingHints(worker="a")))
        front.router.drain("a")
        with pytest.raises(RequestError) as refused:
            await front.collect(ask(routing=RoutingHints(worker="a")))
        assert (refused.value.status, refused.value.code) == (503, "worker_unavailable")

    run(work())


def test_without_workers_a_request_waits_a_while_for_one(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        front = house(wait_s=5.0)
        waiting = asyncio.create_task(front.collect(ask()))
        await asyncio.sleep(0)
        assert not front.engine.has_workers
        front.workers.join(worker("late"))
        assert told(await waiting)[0] == worker.reply
        front = house(wait_s=0.05)
        with pytest.raises(NoWorkerError):
            await front.collect(ask())

    run(work())


def test_who_excludes_all_workers_is_told_at_once_unless_one_may_be_about_to_come(
    run: Any, worker: Any, house: Any
) -> None:
    now_s = 1000.0
    excluding = ask(routing=RoutingHints(exclude=frozenset("abz")))

    async def is_refused(asking: Callable[[GenerationRequest], Awaitable[object]]) -> None:
        with pytest.raises(RequestError, match="all workers are excluded, a, b; leave one of them out") as refused:
            await asking(excluding)
        error = refused.value
        assert (error.status, error.code, error.param) == (404, "worker_not_found", "dynamo.exclude")

    async def work() -> None:
        nonlocal now_s
        front = house(worker("a"), worker("b"), worker("c"), wait_s=8.0, clock=lambda: now_s)
        front.workers.leave("c")
        await is_refused(front.engine.explain)
        waiting = asyncio.create_task(front.collect(excluding))
        await asyncio.sleep(0.01)
        front.workers.join(worker("c"), epoch=2)
        assert told(await waiting)[0] == worker.reply
        front.workers.leave("c")
        waiting = asyncio.create_task(is_refused(front.collect))
        await asyncio.sleep(0.01)
        assert not waiting.done(), "it may be restarted"
        now_s += 8.0
        front.router.tick()
        await waiting
        begun_s = time.monotonic()
        await is_refused(front.collect)
        assert time.monotonic() - begun_s < 4

    run(work())


def test_waiting_for_a_worker_costs_little_however_often_something_changes(
    run: Any, worker: Any, house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may exclude all workers, again and again, with long prompts."""
    counted = Counter[str]()
    tokens = LiveRequest.tokens

    def counting(live: LiveRequest) -> memoryview:
        counted[live.request.request_id] += 1
        return tokens(live)

    monkeypatch.setattr(LiveRequest, "tokens", counting)

    async def work() -> None:
        front = house(worker("a"), wait_s=5.0)
        excluded = replace(ask(routing=RoutingHints(exclude=frozenset({"a"}))), request_id="excluded")
        waiting = asyncio.create_task(front.collect(excluded))
        for _ in range(20):
            await front.collect(ask())
        front.workers.join(worker("b"))
        await waiting
        assert counted["excluded"] == 1

    run(work())


def test_the_only_worker_lost_is_waited_for_and_carries_on_when_it_comes_back(
    run: Any, worker: Any, house: Any
) -> None:
    async def work() -> None:
        front = house(worker("a", [(7, lost("a"))]), wait_s=5.0)
        taken: list[OutputDelta] = []
        waiting = asyncio.create_task(front.collect_into(ask(), taken))
        await until(lambda: len(taken) == 7)
        front.workers.leave("a")
        for _ in range(5):
            await asyncio.sleep(0)
        front.workers.join(worker("a"), epoch=2)
        await waiting
        assert told(taken)[0] == worker.reply

    run(work())


def test_the_only_worker_about_to_leave_is_waited_for_until_it_is_back(run: Any, worker: Any, house: Any) -> None:
    """As where the only worker is restarted in order: nobody is overloaded."""

    async def work() -> None:
        front = house(worker("a", [(0, WorkerDrainingError("a", "leaves"))] * 9), wait_s=5.0)
        waiting = asyncio.create_task(front.collect(ask()))
        await until(lambda: front.engine.migrations.refused == {"draining": 1})
        front.workers.leave("a")
        for _ in range(5):
            await asyncio.sleep(0)
        front.workers.join(worker("a"), epoch=2)
        assert told(await waiting)[0] == worker.reply
        assert front.engine.migrations.refused == {"draining": 1}
        front.check_nothing_is_left()

    run(work())


def test_a_lost_stream_that_finds_nobody_tells_what_happened_to_it(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        front = house(worker("a", [(7, lost("a"))] * 9), wait_s=0.05)
        with pytest.raises(WorkerLostError, match="the script says so"):
            await front.collect(ask())
        assert len(front.workers.links["a"].requests) == 1, "not the very worker that failed it"
        assert front.engine.migrations.exhausted == {"ongoing": 1}
        front.check_nothing_is_left()

    run(work())


def test_a_client_that_leaves_ends_everything_at_once(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        link = worker("a")
        front = house(link)
        gains = front.engine.generate(ask())
        await anext(gains)
        assert (link.live, front.router.stats().num_bookings) == (1, 1)
        await gains.aclose()
        front.check_nothing_is_left()
        for hold in (True, False):  # cancelled while it waits for tokens, and while it waits for a worker
            link.hold = hold
            if not hold:
                front.workers.leave("a")
            task = asyncio.create_task(front.collect(ask()))
            for _ in range(5):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            front.check_nothing_is_left()

    run(work())


def test_busy_workers_are_waited_for_by_priority_and_carry_ons_go_first(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        front = house(worker("a", hold=True), max_waiting=2)
        link = front.workers.links["a"]
        front.workers.leave("a")
        front.workers.join(link, max_running=1)
        order: list[str] = []

        async def one(name: str, priority: int) -> None:
            request = replace(ask(max_tokens=2, routing=RoutingHints(priority=priority)), request_id=name)
            await front.collect(request)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(f"r{number}", 0)) for number in range(4)]  # busy from here on
            await until(lambda: len(link.requests) == 4)
            tasks = [group.create_task(one("low", -1)), group.create_task(one("high", 5))]
            await until(lambda: len(front.room) == 2)
            with pytest.raises(RequestError) as refused:
                await front.collect(ask(routing=RoutingHints(priority=-1)))
            assert (refused.value.status, refused.value.code) == (429, "workers_busy")
            link.proceed.set()
        assert len(running) + len(tasks) == len(order)
        assert order.index("high") < order.index("low")
        front.check_nothing_is_left()

    run(work())


def test_a_request_that_has_begun_goes_before_all_that_have_not(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        full, failing = worker("full", hold=True), worker("failing", [(2, lost("failing"))])
        front = house()
        front.workers.join(full, max_running=1)
        pinned = replace(ask(max_tokens=2), routing=RoutingHints(worker="full"))
        async with asyncio.TaskGroup() as group:
            for number in range(4):  # busy from here on
                group.create_task(front.collect(replace(pinned, request_id=f"p{number}")))
            await until(lambda: len(full.requests) == 4)
            front.workers.join(failing, max_running=1)
            begun = front.engine.generate(replace(ask(max_tokens=4), request_id="begun"))
            await anext(begun)
            front.workers.router.drain("failing")
            urgent = replace(ask(max_tokens=2, routing=RoutingHints(priority=100)), request_id="urgent")
            group.create_task(front.collect(urgent))
            await until(lambda: len(front.room) == 1)
            group.create_task(finish(begun))
            await until(lambda: len(front.room) == 2)
            full.proceed.set()
        assert [one.request_id for one in full.requests[4:]] == ["begun#2", "urgent#1"]

    run(work())


async def finish(gains: AsyncGenerator[list[OutputDelta], None]) -> None:
    async with aclosing(gains):
        async for _ in gains:
            pass


def test_what_the_cache_had_is_what_the_first_worker_to_deliver_said(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        cached = {"a": 1, "b": 2, "c": 3, "d": 4}
        failures = {"a": [(0, lost("a"))], "b": [(4, lost("b"))], "c": [(4, lost("c"))], "d": []}
        links = [worker(name, failures[name], cached=cached[name]) for name in "abcd"]
        front = house(*links, mode="round-robin")
        assert told(await front.collect(ask()))[4] == {2}

    run(work())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # there is no event for everything
            await asyncio.sleep(0)


def test_what_was_predicted_is_compared_with_what_was_found(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        front = house(worker("a", cached=8))
        journeys = []
        for _ in range(2):
            request = ask()
            await front.collect(request)
            assert request.journey is not None
            journeys.append(request.journey)
        assert [journey.overlap_blocks for journey in journeys] == [0, 2]
        assert [journey.predicted_cached_tokens for journey in journeys] == [0, 8]
        assert all(journey.worker_id == "a" and journey.route_s > 0 for journey in journeys)
        stats = front.router.stats()
        assert (stats.actual_cached_tokens, stats.reported_predicted_tokens) == (16, 8)

    run(work())


def test_explaining_books_nothing_and_waits_for_nobody(run: Any, worker: Any, house: Any) -> None:
    async def work() -> None:
        front = house(worker("a"), worker("b"))
        decision = await front.engine.explain(ask())
        assert {candidate.worker_id for candidate in decision.candidates} == {"a", "b"}
        front.check_nothing_is_left()
        for worker_id in "ab":
            front.workers.leave(worker_id)
        with pytest.raises(NoWorkerError):
            await front.engine.explain(ask())

    run(work())
