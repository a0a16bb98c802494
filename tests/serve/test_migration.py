"""Requests over workers that fail: a real router, and links that do what a script says."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.router.config import RouterConfig
from dynamo.router.router import Router
from dynamo.router.waiting import WaitingRoom
from dynamo.router.workers import WorkerCard
from dynamo.serve.engine.output_text import OutputText
from dynamo.serve.engine.request import (
    EngineStats,
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
from dynamo.serve.migration import RoutedEngine

BLOCK = 4
REPLY = "Zwölf Boxkämpfer jagen →Viktor← quer über den Sylter Deich."
EOS = 257


def card(worker_id: str, epoch: int = 1) -> WorkerCard:
    return WorkerCard(
        worker_id=worker_id,
        epoch=epoch,
        model="m",
        fingerprint="00" * 8,
        hash_version=HASH_VERSION,
        block_size=BLOCK,
        has_events=False,
    )


@dataclass
class Link:
    """A worker that knows the whole reply, and says it from where the request stands.

    Attributes:
        failures: per attempt, what happens: after how many deltas, and with which error; none left: it works.
        steps: per attempt, how many tokens each delta has, again and again.
        cached: what it says of the cache.
        hold: waits for `proceed` before its first delta.
    """

    worker_id: str
    codec: Any
    failures: list[tuple[int, Exception]] = field(default_factory=list)
    steps: tuple[int, ...] = (1,)
    cached: int = 0
    hold: bool = False
    proceed: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[GenerationRequest] = field(default_factory=list)
    live: int = 0

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

    def _deltas(self, request: GenerationRequest) -> Iterator[OutputDelta]:
        text = OutputText(request, self.codec, eos_token_ids=frozenset([EOS]), max_model_len=10_000)
        ids = tokens_of(request)[len(request.output_token_ids) :]
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


def tokens_of(request: GenerationRequest) -> list[int]:
    """What a seeded or greedy engine generates: the reply, and noise of the seed, the same at every place."""
    seed = request.sampling.seed
    if request.sampling.temperature > 0:
        assert seed is not None, "a request that samples must have a seed, or nobody could go on with it"
        rng = random.Random(seed)
        return [rng.choice([*REPLY.encode(), EOS]) for _ in range(600)]
    return [*REPLY.encode(), EOS] * 10


class Workers:
    """A fleet of scripted links."""

    def __init__(self, router: Router, *links: Link) -> None:
        self.router = router
        self.links: dict[str, Link] = {}
        for link in links:
            self.join(link)

    def join(self, link: Link, epoch: int = 1) -> None:
        self.links[link.worker_id] = link
        self.router.join(card(link.worker_id, epoch))

    def leave(self, worker_id: str) -> None:
        del self.links[worker_id]
        self.router.leave(worker_id)

    def link(self, worker_id: str) -> Link | None:
        return self.links.get(worker_id)

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

    async def start(self) -> None: ...

    async def close(self) -> None: ...


class House:
    """Everything of one test."""

    def __init__(self, *links: Link, limit: int = 3, wait_s: float = 0.3, **config: Any) -> None:
        self.router = Router(RouterConfig(**config), rng=random.Random(1))
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
    codec: Any, failures: list[tuple[int, Exception]], steps: list[int], sampling: dict[str, Any]
) -> None:
    sampling = {"max_tokens": 40, **sampling}
    sampling["min_tokens"] = min(sampling.get("min_tokens", 0), sampling["max_tokens"])
    request = ask(**sampling)

    async def work(links: list[Link]) -> list[OutputDelta]:
        house = House(*links)
        deltas = await house.collect(request)
        house.check_nothing_is_left()
        migrations = house.engine.migrations
        assert migrations.detected.total() <= 3
        assert migrations.exhausted.total() == 0
        return deltas

    whole = asyncio.run(work([Link("alone", codec, cached=3)]))
    plan = [Link(f"w{number}", codec, [failure], tuple(steps), 3) for number, failure in enumerate(failures)]
    carried = asyncio.run(work([*plan, Link("last", codec, steps=tuple(steps), cached=3)]))
    assert told(carried) == told(whole)


@pytest.mark.parametrize("after", [0, 1, 20])
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_original_error_comes_after_the_last_attempt(run: Any, codec: Any, after: int, limit: int) -> None:
    links = [Link(f"w{number}", codec, [(after, lost(f"w{number}"))] * 9) for number in range(5)]
    taken: list[OutputDelta] = []

    async def work() -> None:
        house = House(*links, limit=limit)
        with pytest.raises(WorkerLostError, match="the script says so"):
            await house.collect_into(ask(), taken)
        house.check_nothing_is_left()
        phases = ["new" if after == 0 else "ongoing"] * (limit + 1)
        assert list(house.engine.migrations.detected.elements()) == phases
        assert house.engine.migrations.exhausted.total() == 1
        assert house.engine.migrations.succeeded.total() == (limit if after else 0)

    run(work())
    assert sum(len(link.requests) for link in links) == limit + 1
    assert all(delta.finish_reason is None for delta in taken)
    assert len(taken) == after * (limit + 1)


def test_each_attempt_has_an_id_of_its_own_and_what_the_client_has(run: Any, codec: Any) -> None:
    links = [Link(name, codec, [(3, lost(name))]) for name in "abc"]
    last = Link("d", codec)

    async def work() -> None:
        house = House(*links, last)
        request = ask()
        await house.collect(request)
        attempts = sorted(
            (one for link in house.workers.links.values() for one in link.requests), key=lambda one: one.request_id
        )
        ids = [one.request_id for one in attempts]
        assert ids == [f"r#{number}" for number in range(1, len(ids) + 1)] and len(ids) > 1
        for number, attempt in enumerate(attempts):
            assert attempt.output_token_ids == list(REPLY.encode())[: 3 * number]
            assert attempt.prompt_token_ids == request.prompt_token_ids
            assert attempt.sampling == request.sampling
        assert request.journey is not None and request.journey.num_attempts == len(ids)

    run(work())


def test_a_request_that_samples_without_a_seed_gets_one_and_others_keep_theirs(run: Any, codec: Any) -> None:
    async def seeds(**sampling: Any) -> list[int | None]:
        links = [Link("a", codec, [(2, lost())] * 2), Link("b", codec)]
        house = House(*links)
        for _ in range(2):
            await house.collect(ask(max_tokens=9, **sampling))
        return [one.sampling.seed for link in links for one in link.requests]

    assert set(run(seeds())) == {None}
    assert set(run(seeds(temperature=1.0, seed=5))) == {5}
    given = run(seeds(temperature=1.0))
    assert len(set(given)) == 2, "two requests, each with one seed for all its attempts"
    assert None not in given


def test_a_failed_worker_is_set_aside_and_its_load_freed_before_the_next_choice(run: Any, codec: Any) -> None:
    async def work() -> None:
        failing = [Link(name, codec, [(4, lost(name))]) for name in "ab"]
        house = House(*failing, Link("c", codec), mode="round-robin")
        bookings: list[int] = []

        class Spying(Link):
            async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
                bookings.append(house.router.stats().num_bookings)
                async with aclosing(super().generate(request)) as gains:
                    async for deltas in gains:
                        yield deltas

        for link in [*house.workers.links.values()]:
            house.workers.links[link.worker_id] = Spying(link.worker_id, codec, link.failures)
        await house.collect(ask())
        assert bookings == [1, 1, 1]
        assert {w.worker_id for w in house.router.stats().workers if w.is_set_aside} == {"a", "b"}

    run(work())


@pytest.mark.parametrize("error", [EngineOverloadedError("full"), WorkerDrainingError("x", "leaves")])
def test_a_worker_without_room_is_passed_over_and_keeps_its_good_name(run: Any, codec: Any, error: Exception) -> None:
    async def work() -> None:
        refusing = [Link(f"w{number}", codec, [(0, error)]) for number in range(6)]
        house = House(*refusing, Link("last", codec), limit=0, mode="round-robin")
        assert told(await house.collect(ask()))[1][-1] == EOS
        assert not any(worker.is_set_aside for worker in house.router.stats().workers)
        assert house.engine.migrations.refused.total() == 6
        assert house.engine.migrations.detected.total() == 0

    run(work())


def test_overload_everywhere_is_told_as_such(run: Any, codec: Any) -> None:
    async def work() -> None:
        house = House(*(Link(name, codec, [(0, EngineOverloadedError("full"))]) for name in "abc"))
        with pytest.raises(EngineOverloadedError):
            await house.collect(ask())
        house.check_nothing_is_left()

    run(work())


def test_a_stream_that_was_begun_outlasts_a_moment_of_overload(run: Any, codec: Any) -> None:
    async def work() -> None:
        full = EngineOverloadedError("full")
        house = House(
            Link("a", codec, [(5, lost("a"))]), Link("b", codec, [(0, full), (0, full)]), mode="round-robin", wait_s=5.0
        )
        request = asyncio.create_task(house.collect(ask()))
        while len(house.workers.links["b"].requests) < 2:
            await asyncio.sleep(0)
            house.router.tick()  # as reports of the workers do
        assert told(await request)[1][-1] == EOS

    run(work())


def test_an_error_of_the_request_itself_is_not_tried_elsewhere(run: Any, codec: Any) -> None:
    async def work() -> None:
        bad = RequestFailedError("bad")
        links = [Link(name, codec, [(2, bad)] * 9) for name in "ab"]
        house = House(*links)
        with pytest.raises(RequestFailedError, match="bad"):
            await house.collect(ask())
        assert sum(len(link.requests) for link in links) == 1
        assert not any(worker.is_set_aside for worker in house.router.stats().workers)
        house.check_nothing_is_left()

    run(work())


def test_a_stream_without_an_end_is_a_lost_one(run: Any, codec: Any) -> None:
    class Short(Link):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
            yield [OutputDelta("Z", [ord("Z")])]

    async def work() -> None:
        house = House(Short("a", codec), Link("b", codec), mode="round-robin")
        assert told(await house.collect(ask()))[0] == REPLY
        assert house.engine.migrations.succeeded["ongoing"] == 1

    run(work())


@pytest.mark.parametrize("after", [0, 3])
def test_a_pinned_request_is_not_carried_on(run: Any, codec: Any, after: int) -> None:
    async def work() -> None:
        other = Link("b", codec)
        house = House(Link("a", codec, [(after, lost("a"))]), other)
        with pytest.raises(RequestError, match="asked for no other") as refused:
            await house.collect(ask(routing=RoutingHints(worker="a")))
        assert (refused.value.status, refused.value.code) == (503, "pinned_worker_lost")
        assert other.requests == []
        house.check_nothing_is_left()

    run(work())


def test_a_pin_and_an_exclusion_are_obeyed(run: Any, codec: Any) -> None:
    async def work() -> None:
        links = {name: Link(name, codec) for name in "abc"}
        house = House(*links.values())
        for _ in range(4):
            await house.collect(ask(routing=RoutingHints(worker="b")))
            await house.collect(ask(routing=RoutingHints(exclude=frozenset("ab"))))
        assert [len(link.requests) for link in links.values()] == [0, 4, 4]

    run(work())


def test_a_pin_to_nobody_and_to_one_that_is_full_are_told_apart(run: Any, codec: Any) -> None:
    async def work() -> None:
        house = House(Link("a", codec, [(0, EngineOverloadedError("full"))]), Link("b", codec))
        with pytest.raises(RequestError) as refused:
            await house.collect(ask(routing=RoutingHints(worker="z")))
        assert (refused.value.status, refused.value.code) == (404, "worker_not_found")
        with pytest.raises(EngineOverloadedError):
            await house.collect(ask(routing=RoutingHints(worker="a")))
        house.router.drain("a")
        with pytest.raises(RequestError) as refused:
            await house.collect(ask(routing=RoutingHints(worker="a")))
        assert (refused.value.status, refused.value.code) == (503, "worker_unavailable")

    run(work())


def test_without_workers_a_request_waits_a_while_for_one(run: Any, codec: Any) -> None:
    async def work() -> None:
        house = House(wait_s=5.0)
        waiting = asyncio.create_task(house.collect(ask()))
        await asyncio.sleep(0)
        assert not house.engine.has_workers
        house.workers.join(Link("late", codec))
        assert told(await waiting)[0] == REPLY
        house = House(wait_s=0.05)
        with pytest.raises(NoWorkerError):
            await house.collect(ask())

    run(work())


def test_the_only_worker_lost_is_waited_for_and_carries_on_when_it_comes_back(run: Any, codec: Any) -> None:
    async def work() -> None:
        house = House(Link("a", codec, [(7, lost("a"))]), wait_s=5.0)
        taken: list[OutputDelta] = []
        waiting = asyncio.create_task(house.collect_into(ask(), taken))
        await until(lambda: len(taken) == 7)
        house.workers.leave("a")
        for _ in range(5):
            await asyncio.sleep(0)
        house.workers.join(Link("a", codec), epoch=2)
        await waiting
        assert told(taken)[0] == REPLY

    run(work())


def test_a_lost_stream_that_finds_nobody_tells_what_happened_to_it(run: Any, codec: Any) -> None:
    async def work() -> None:
        house = House(Link("a", codec, [(7, lost("a"))] * 9), wait_s=0.05)
        with pytest.raises(WorkerLostError, match="the script says so"):
            await house.collect(ask())
        assert len(house.workers.links["a"].requests) == 1, "not the very worker that failed it"
        assert house.engine.migrations.exhausted == {"ongoing": 1}
        house.check_nothing_is_left()

    run(work())


def test_a_client_that_leaves_ends_everything_at_once(run: Any, codec: Any) -> None:
    async def work() -> None:
        link = Link("a", codec)
        house = House(link)
        gains = house.engine.generate(ask())
        await anext(gains)
        assert (link.live, house.router.stats().num_bookings) == (1, 1)
        await gains.aclose()
        house.check_nothing_is_left()
        for hold in (True, False):  # cancelled while it waits for tokens, and while it waits for a worker
            link.hold = hold
            if not hold:
                house.workers.leave("a")
            task = asyncio.create_task(house.collect(ask()))
            for _ in range(5):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            house.check_nothing_is_left()

    run(work())


def test_busy_workers_are_waited_for_by_priority_and_carry_ons_go_first(run: Any, codec: Any) -> None:
    async def work() -> None:
        house = House(Link("a", codec, hold=True), max_waiting=2)
        link = house.workers.links["a"]
        house.router.leave("a")
        house.router.join(replace(card("a"), max_running=1))
        order: list[str] = []

        async def one(name: str, priority: int) -> None:
            request = replace(ask(max_tokens=2, routing=RoutingHints(priority=priority)), request_id=name)
            await house.collect(request)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(f"r{number}", 0)) for number in range(4)]  # busy from here on
            await until(lambda: len(link.requests) == 4)
            tasks = [group.create_task(one("low", -1)), group.create_task(one("high", 5))]
            await until(lambda: len(house.room) == 2)
            with pytest.raises(RequestError) as refused:
                await house.collect(ask(routing=RoutingHints(priority=-1)))
            assert (refused.value.status, refused.value.code) == (429, "workers_busy")
            link.proceed.set()
        assert len(running) + len(tasks) == len(order)
        assert order.index("high") < order.index("low")
        house.check_nothing_is_left()

    run(work())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # there is no event for everything
            await asyncio.sleep(0)


def test_what_was_predicted_is_compared_with_what_was_found(run: Any, codec: Any) -> None:
    async def work() -> None:
        house = House(Link("a", codec, cached=8))
        journeys = []
        for _ in range(2):
            request = ask()
            await house.collect(request)
            assert request.journey is not None
            journeys.append(request.journey)
        assert [journey.overlap_blocks for journey in journeys] == [0, 2]
        assert [journey.predicted_cached_tokens for journey in journeys] == [0, 8]
        assert all(journey.worker_id == "a" and journey.route_s > 0 for journey in journeys)
        stats = house.router.stats()
        assert (stats.actual_cached_tokens, stats.reported_predicted_tokens) == (16, 8)

    run(work())


def test_explaining_books_nothing_and_waits_for_nobody(run: Any, codec: Any) -> None:
    async def work() -> None:
        house = House(Link("a", codec), Link("b", codec))
        decision = await house.engine.explain(ask())
        assert {candidate.worker_id for candidate in decision.candidates} == {"a", "b"}
        house.check_nothing_is_left()
        for worker_id in "ab":
            house.workers.leave(worker_id)
        with pytest.raises(NoWorkerError):
            await house.engine.explain(ask())

    run(work())
