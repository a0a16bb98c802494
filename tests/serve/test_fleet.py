import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo.kvcache.event_publisher import EventPublisher
from dynamo.kvcache.events import EventLog, Snapshot
from dynamo.kvcache.hashing import BlockKey, block_keys, chain_root, pack_tokens
from dynamo.router.config import RouterConfig
from dynamo.router.decision import RouteQuery
from dynamo.router.router import Router
from dynamo.router.workers import LoadReport, WorkerCard
from dynamo.serve.discovery import FolderDiscovery, Joined, Left, MemoryDiscovery, Registration
from dynamo.serve.engine.request import GenerationRequest, OutputDelta, SamplingParams
from dynamo.serve.errors import WorkerLostError
from dynamo.serve.external import ExternalModel
from dynamo.serve.external_member import ExternalServer
from dynamo.serve.fleet import Fleet
from dynamo.serve.http_server import use_all_descriptors
from dynamo.serve.plane.front_session import SessionTimes
from dynamo.serve.plane.worker_app import WorkerApp
from dynamo.serve.stay import FleetTimes

CARD = WorkerCard(worker_id="", epoch=1, model="demo", fingerprint="00" * 8, hash_version=1, block_size=16)
PROMPT = list(range(100))
KEYS = block_keys(PROMPT, 16, chain_root(bytes.fromhex(CARD.fingerprint), 16))


class Counted(Collector):
    """Something that a worker counts."""

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("dynamo_test", "Something.", 1)


class LocalWorker:
    """A worker on the test's event loop: a scripted engine, a cache that is only an event log, and its publisher."""

    def __init__(self, worker_id: str, engine: Any, folder: Path, *, epoch: int = 1, model: str = "demo") -> None:
        self.card = replace(CARD, worker_id=worker_id, epoch=epoch, model=model)
        self.engine = engine
        self.path = folder / f"{worker_id}.{epoch}"
        self.log = EventLog()
        self.held: list[BlockKey] = []
        self.counters: dict[str, int] = {}
        self.take_snapshot: Callable[[], Snapshot] = self._snapshot

    def store(self, keys: Sequence[BlockKey]) -> None:
        self.log.stored("device", list(keys), self.held[-1] if self.held else None)
        self.held += keys

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.log.last_number, {"device": list(self.held)})

    @asynccontextmanager
    async def serving(self, plane: Any) -> AsyncIterator[Registration]:
        publisher = EventPublisher(
            self.log,
            epoch=self.card.epoch,
            endpoint=f"ipc://{self.path}.events",
            replay_endpoint=f"ipc://{self.path}.replay",
        )
        with publisher:
            self.app = WorkerApp(
                self.engine,
                self.card,
                report=lambda: LoadReport(
                    num_running=2, num_waiting=1, prefill_tokens_waiting=0, counters=self.counters
                ),
                snapshot=lambda: self.take_snapshot(),
                publish_load=publisher.publish_load,
                collectors=[Counted()],
                times=SessionTimes(report_s=0.05),
            )
            async with plane.asgi(self.app, f"{self.path}.http") as address:
                try:
                    yield Registration(
                        card=self.card,
                        address=address,
                        events=publisher.endpoint,
                        replay=publisher.replay_endpoint,
                        pid=os.getpid(),
                    )
                finally:
                    await self.app.close()


def make_router(front_id: str = "front-a") -> Router:
    return Router(RouterConfig(front_id=front_id))


@asynccontextmanager
async def running(discovery: Any, router: Router, **options: Any) -> AsyncIterator[Fleet]:
    """A fleet that leaves no task behind."""
    before = asyncio.all_tasks()
    fleet = Fleet(discovery, router, model="demo", **options)
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close()
        await fleet.close()
        assert router.worker_ids == ()
        left = {task.get_name() for task in asyncio.all_tasks() - before}
        assert not {name for name in left if name.startswith(("worker-", "kv-events-"))}


def query(tokens: Sequence[int] = PROMPT) -> RouteQuery:
    return RouteQuery(tokens=pack_tokens(list(tokens)), request_id="q")


def cached(router: Router, worker_id: str) -> int | None:
    """Blocks of `PROMPT` that the router believes a worker to hold; None where it is no member."""
    if worker_id not in router.worker_ids:
        return None
    explained = router.explain(query())
    return next(one.reach.device if one.reach else 0 for one in explained.candidates if one.worker_id == worker_id)


def request(request_id: str = "r", *, max_tokens: int = 100) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id, prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=max_tokens)
    )


async def collect(link: Any, wanted: GenerationRequest) -> list[OutputDelta]:
    return [delta async for deltas in link.generate(wanted) for delta in deltas]


def test_a_worker_takes_requests_once_its_blocks_are_known(plane: Any, scripted: Any, run: Any) -> None:
    async def test() -> None:
        discovery, router = MemoryDiscovery(), make_router()
        worker = LocalWorker("w", scripted(), plane.folder)
        worker.store(KEYS[:4])
        async with worker.serving(plane) as registration, running(discovery, router) as fleet:
            assert not await fleet.wait_ready(0.01)
            await discovery.register(registration)
            assert await fleet.wait_ready(5)
            assert cached(router, "w") == 4
            link = fleet.link("w")
            assert link is not None
            assert len(await collect(link, request())) == len(worker.engine.reply)
            worker.store(KEYS[4:])
            await plane.until(lambda: cached(router, "w") == 6)
            (stats,) = fleet.stats()
            assert (stats.worker_id, stats.epoch, stats.is_ready) == ("w", 1, True)
            assert stats.feed is not None
            assert stats.feed.feed.snapshots == 1

    run(test())


def test_workers_are_asked_for_their_metrics_and_one_that_does_not_answer_is_none(
    plane: Any, scripted: Any, run: Any
) -> None:
    async def test() -> None:
        discovery, router = MemoryDiscovery(), make_router()
        workers = [LocalWorker(name, scripted(), plane.folder) for name in ("w", "mute")]
        async with (
            workers[0].serving(plane) as there,
            workers[1].serving(plane) as mute,
            running(discovery, router) as fleet,
        ):
            for registration in (there, replace(mute, address=f"unix:{plane.folder}/nobody")):
                await discovery.register(registration)
            assert await fleet.wait_ready(5)
            pages = await fleet.metrics()
            assert pages["mute"] is None
            assert pages["w"] is not None
            assert b"dynamo_test_total 1.0" in pages["w"]

    run(test())


def test_a_worker_whose_blocks_stay_unknown_takes_requests_all_the_same(
    plane: Any, scripted: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Snapshot:
        raise OSError("no snapshot today")

    async def test() -> None:
        discovery, router = MemoryDiscovery(), make_router()
        worker = LocalWorker("w", scripted(), plane.folder)
        worker.take_snapshot = fail
        async with (
            worker.serving(plane) as registration,
            running(discovery, router, times=FleetTimes(ready_s=0.3)) as fleet,
        ):
            await discovery.register(registration)
            await plane.until(lambda: router.worker_ids == ("w",))
            assert fleet.link("w") is None
            assert await fleet.wait_ready(5)
            assert fleet.link("w") is not None

    run(test())
    assert "what worker w holds is still not known after 0.3 s" in caplog.text


def test_a_worker_that_leaves_in_order_ends_what_it_has(plane: Any, scripted: Any, run: Any) -> None:
    async def test() -> None:
        discovery, router = MemoryDiscovery(), make_router()
        worker = LocalWorker("w", scripted(hold_after=2), plane.folder)
        worker.store(KEYS)
        async with worker.serving(plane) as registration, running(discovery, router) as fleet:
            registered = await discovery.register(registration)
            assert await fleet.wait_ready(5)
            task = asyncio.create_task(collect(fleet.link("w"), request()))
            await plane.until(lambda: bool(worker.engine.live))
            await registered.close()
            await plane.until(lambda: router.worker_ids == ())
            assert router.index.stats().num_entries == 0
            assert fleet.link("w") is None
            worker.engine.proceed.set()
            assert len(await task) == len(worker.engine.reply)

    run(test())


def test_a_lost_worker_is_out_of_the_router_before_its_requests_hear_of_it_and_comes_back(
    plane: Any, scripted: Any, run: Any
) -> None:
    async def test() -> None:
        discovery, router = MemoryDiscovery(), make_router()
        worker = LocalWorker("w", scripted(hold_after=2), plane.folder)
        worker.store(KEYS)
        async with running(discovery, router) as fleet:
            async with worker.serving(plane) as registration:
                await discovery.register(registration)
                assert await fleet.wait_ready(5)
                first = fleet.link("w")
                tasks = [asyncio.create_task(_members_at_loss(router, first, request(f"r{i}"))) for i in range(4)]
                await plane.until(lambda: len(worker.engine.live) == 4)
                await worker.app.close()
                assert await asyncio.gather(*tasks) == [()] * 4
                assert router.index.stats().num_entries == 0
            worker.engine.hold_after = None
            async with worker.serving(plane):
                assert await fleet.wait_ready(5)
                again = fleet.link("w")
                assert again is not None
                assert again is not first
                assert cached(router, "w") == 6
                assert await collect(again, request())

    run(test())


async def _members_at_loss(router: Router, link: Any, wanted: GenerationRequest) -> tuple[str, ...]:
    try:
        await collect(link, wanted)
    except WorkerLostError:
        return router.worker_ids
    raise AssertionError("the worker was not lost")


def test_a_worker_that_says_it_drains_gets_nothing_new(plane: Any, scripted: Any, run: Any) -> None:
    async def test() -> None:
        discovery, router = MemoryDiscovery(), make_router()
        first = LocalWorker("first", scripted(), plane.folder)
        other = LocalWorker("other", scripted(), plane.folder)
        first.store(KEYS)
        async with (
            first.serving(plane) as registration,
            other.serving(plane) as other_registration,
            running(discovery, router) as fleet,
        ):
            await discovery.register(registration)
            await discovery.register(other_registration)
            assert await fleet.wait_ready(5, num_workers=2)
            assert router.explain(query()).worker_id == "first"
            await fleet.drain("first")
            assert first.app.drain_requested.is_set()
            assert router.explain(query()).worker_id == "other"
            other.app.begin_drain()
            await plane.until(lambda: all(worker.is_draining for worker in router.stats().workers))

    run(test())


def test_a_worker_of_another_model_is_refused(
    plane: Any, scripted: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        discovery, router = MemoryDiscovery(), make_router()
        worker = LocalWorker("w", scripted(), plane.folder, model="other")
        async with worker.serving(plane) as registration, running(discovery, router) as fleet:
            await discovery.register(registration)
            await plane.until(lambda: "serves 'other', and this front 'demo'" in caplog.text)
            assert not fleet.num_ready
            assert router.worker_ids == ()

    run(test())


def test_an_error_of_the_front_costs_a_worker_a_moment_and_not_its_place(
    plane: Any, scripted: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Router):
        num_failures = 1

        def join(self, card: WorkerCard) -> int:
            if self.num_failures:
                self.num_failures -= 1
                raise OSError("no descriptors left")
            return super().join(card)

    async def test() -> None:
        discovery, router = MemoryDiscovery(), Failing(RouterConfig())
        worker = LocalWorker("w", scripted(), plane.folder)
        async with worker.serving(plane) as registration, running(discovery, router) as fleet:
            await discovery.register(registration)
            assert await fleet.wait_ready(10)
            assert len(await collect(fleet.link("w"), request())) == len(worker.engine.reply)

    run(test())
    assert "worker w is out after an error of this front" in caplog.text


def test_an_error_while_looking_for_workers_is_told_once_and_costs_none(
    plane: Any, scripted: Any, run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dynamo.serve.fleet._FIRST_RETRY_S", 0.02)

    class Failing(MemoryDiscovery):
        num_failures = 0
        is_failing = False

        async def watch(self, known: Iterable[Registration] = ()) -> AsyncGenerator[Joined | Left, None]:
            self.check()
            async with aclosing(super().watch(known)) as changes:
                async for change in changes:
                    self.check()
                    yield change

        def check(self) -> None:
            if self.is_failing:
                self.num_failures += 1
                raise RecursionError("what nobody foresaw")

    async def test() -> None:
        discovery, router = Failing(), make_router()
        names = ("stays", "leaves", "is-replaced", "comes")
        workers = {name: LocalWorker(name, scripted(), plane.folder) for name in names}
        async with AsyncExitStack() as stack:
            there = {name: await stack.enter_async_context(one.serving(plane)) for name, one in workers.items()}
            fleet = await stack.enter_async_context(running(discovery, router))
            registered = {name: await discovery.register(there[name]) for name in names[:3]}
            assert await fleet.wait_ready(5, 3)
            link = fleet.link("stays")
            before = fleet.link("is-replaced")
            discovery.is_failing = True
            await registered["leaves"].close()
            await registered["is-replaced"].close()
            await discovery.register(replace(there["is-replaced"], events=""))
            await discovery.register(there["comes"])
            await plane.until(lambda: discovery.num_failures == 3)
            assert {*router.worker_ids} == {*names[:3]}
            discovery.is_failing = False
            await plane.until(lambda: {*router.worker_ids} == {"stays", "is-replaced", "comes"})
            assert await fleet.wait_ready(5, 3)
            assert fleet.link("is-replaced") is not before
            assert fleet.link("stays") is link is not None, "nothing has become of it"

    run(test())
    assert caplog.text.count("workers are not looked for") == 1


def test_fronts_hear_of_each_others_requests_from_the_workers(plane: Any, scripted: Any, run: Any) -> None:
    async def test() -> None:
        discovery, mine, theirs = MemoryDiscovery(), make_router("front-a"), make_router("front-b")
        worker = LocalWorker("w", scripted(hold_after=1), plane.folder)

        def foreign(router: Router) -> int:
            return sum(one.num_foreign for one in router.stats().workers)

        async with (
            worker.serving(plane) as registration,
            running(discovery, mine) as fleet,
            running(discovery, theirs) as other,
        ):
            await discovery.register(registration)
            assert await fleet.wait_ready(5)
            assert await other.wait_ready(5)
            async with aclosing(fleet.link("w").generate(request())) as steps:  # type: ignore[union-attr]
                await anext(steps)
                await plane.until(lambda: foreign(theirs) == 1)
                assert foreign(mine) == 0
            await plane.until(lambda: foreign(theirs) == 0)
            async with aclosing(fleet.link("w").generate(request("again"))) as steps:  # type: ignore[union-attr]
                await anext(steps)
                await plane.until(lambda: foreign(theirs) == 1)
                await fleet.close()
                await plane.until(lambda: foreign(theirs) == 0)

    run(test())


def test_totals_go_on_when_workers_come_and_go(plane: Any, scripted: Any, run: Any) -> None:
    async def test() -> None:
        discovery, router = MemoryDiscovery(), make_router()
        async with running(discovery, router) as fleet, AsyncExitStack() as stack:
            for epoch, generated in ((1, 10), (2, 7)):
                worker = LocalWorker("w", scripted(), plane.folder, epoch=epoch)
                worker.counters = {"generated_tokens": generated, "num_steps": 1}
                discovery.put(await stack.enter_async_context(worker.serving(plane)))
                await plane.until(lambda: bool(fleet.totals().num_running))
                worker.counters = {"generated_tokens": generated + 1, "num_steps": 2}
                expected = sum((10, 7)[:epoch]) + epoch
                await plane.until(lambda expected=expected: fleet.totals().generated_tokens == expected)
            assert fleet.totals().num_steps == 4
            discovery.remove("w")
            await plane.until(lambda: not fleet.totals().num_running)
            assert fleet.totals().generated_tokens == 19

    run(test())


# --- servers of another make


class FakeServer:
    """A server of another make, which works when a test wants it to."""

    def __init__(self, worker_id: str = "outside", *, is_well: bool = False) -> None:
        self.worker_id = worker_id
        self.is_well = is_well
        self.is_closed = False

    async def connect(self) -> ExternalModel:
        await self.check_health()
        return ExternalModel(name="theirs", max_model_len=512, extras=(), has_token_ids=False)

    async def check_health(self) -> None:
        if not self.is_well:
            raise WorkerLostError(self.worker_id, "it is not well")

    async def generate(self, wanted: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        yield [OutputDelta("hello", finish_reason="stop")]

    async def close(self) -> None:
        self.is_closed = True


def test_an_external_server_is_a_member_while_it_is_well(plane: Any, run: Any) -> None:
    async def test() -> None:
        server, router = FakeServer(), make_router()
        times = FleetTimes(health_s=0.02)
        async with running(None, router, external=[ExternalServer(link=server)], times=times) as fleet:
            assert not await fleet.wait_ready(0.05)
            for _ in range(2):
                server.is_well = True
                assert await fleet.wait_ready(5)
                assert fleet.link("outside") is server
                assert router.explain(query()).worker_id == "outside"
                server.is_well = False
                await plane.until(lambda: router.worker_ids == ())
                assert fleet.link("outside") is None
        assert server.is_closed

    run(test())


def test_more_workers_than_zmq_has_sockets_by_default(plane: Any, run: Any) -> None:
    use_all_descriptors()

    async def test() -> None:
        servers = [
            ExternalServer(link=FakeServer(f"w{number}", is_well=True), events=f"ipc://{plane.folder}/{number}")
            for number in range(400)
        ]
        router, times = make_router(), FleetTimes(health_s=60)
        async with running(None, router, external=servers, times=times) as fleet:
            assert await fleet.wait_ready(20, len(servers))

    run(test())


# --- real processes, and their ends


class Streams:
    """Requests that run for about two seconds each, spread over the workers of a fleet."""

    def __init__(self, fleet: Fleet, names: Sequence[str], num_each: int) -> None:
        self.first_tokens = 0
        self.tasks = {
            (name, i): asyncio.create_task(self._one(fleet, name, i)) for name in names for i in range(num_each)
        }

    async def _one(self, fleet: Fleet, name: str, number: int) -> int:
        link = fleet.link(name)
        assert link is not None
        wanted = replace(request(f"{name}-{number}", max_tokens=150), prompt_token_ids=[number + 5] * 40)
        num_tokens = 0
        async with aclosing(link.generate(wanted)) as steps:
            async for deltas in steps:
                self.first_tokens += num_tokens == 0
                num_tokens += sum(len(delta.token_ids) for delta in deltas)
        return num_tokens

    async def outcomes(self) -> dict[str, list[object]]:
        await asyncio.wait(self.tasks.values())
        found: dict[str, list[object]] = {}
        for (name, _), task in self.tasks.items():
            found.setdefault(name, []).append(task.exception() or task.result())
        return found


@pytest.mark.slow
def test_processes_that_fall_silent_leave_or_die_take_only_what_is_theirs(
    start_worker: Any, discovery: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def start(name: str) -> Any:
        return start_worker(name, "--engine", "mocker", "--mocker-step-time", "0.01", "--mocker-token-time", "0")

    async def test(workers: dict[str, Any]) -> None:
        router = make_router()
        async with running(FolderDiscovery(discovery), router, times=FleetTimes(silence_s=1.5)) as fleet:
            assert await fleet.wait_ready(30, num_workers=3)
            await _falls_silent(fleet, router, workers["b"])
            await _leaves(fleet, router, workers["a"])
            await _is_killed(fleet, router, workers["c"])
            # Another process takes the name, and starts with nothing.
            await asyncio.to_thread(start, "c")
            assert await fleet.wait_ready(30, num_workers=2)
            assert len(held_by(router)) == 1
            assert len(await collect(fleet.link("c"), request(max_tokens=5))) == 5

    with ThreadPoolExecutor() as starting:
        workers = dict(zip("abc", starting.map(start, "abc"), strict=True))
    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(test(workers), 90))
    assert any("worker b is lost: nothing was heard of it for 1." in record.message for record in caplog.records)


async def _falls_silent(fleet: Fleet, router: Router, b: Any) -> None:
    streams = Streams(fleet, "abc", 4)
    await until(lambda: streams.first_tokens == 12 and len(held_by(router)) == 3)
    b.process.send_signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    await until(lambda: set(router.worker_ids) == {"a", "c"})
    assert time.monotonic() - stopped_s < 3
    assert len(held_by(router)) == 2
    outcomes = await streams.outcomes()
    assert outcomes["a"] == outcomes["c"] == [150] * 4
    assert [type(outcome) for outcome in outcomes["b"]] == [WorkerLostError] * 4
    b.process.send_signal(signal.SIGCONT)
    assert await fleet.wait_ready(30, num_workers=3)
    await until(lambda: len(held_by(router)) == 3)


async def _leaves(fleet: Fleet, router: Router, a: Any) -> None:
    """On SIGTERM: nothing new goes there at once, and what runs there comes to its end."""
    streams = Streams(fleet, "abc", 4)
    await until(lambda: streams.first_tokens == 12)
    a.process.send_signal(signal.SIGTERM)
    told_s = time.monotonic()
    await until(lambda: set(router.worker_ids) == {"b", "c"})
    assert time.monotonic() - told_s < 1
    assert len(held_by(router)) == 2
    assert fleet.link("a") is None
    assert await streams.outcomes() == {name: [150] * 4 for name in "abc"}
    assert await asyncio.to_thread(a.process.wait, 30) == 0


async def _is_killed(fleet: Fleet, router: Router, c: Any) -> None:
    streams = Streams(fleet, "bc", 4)
    await until(lambda: streams.first_tokens == 8)
    c.process.kill()
    killed_s = time.monotonic()
    await until(lambda: router.worker_ids == ("b",))
    assert time.monotonic() - killed_s < 1
    assert len(held_by(router)) == 1
    outcomes = await streams.outcomes()
    assert outcomes["b"] == [150] * 4
    assert [type(outcome) for outcome in outcomes["c"]] == [WorkerLostError] * 4


def held_by(router: Router) -> list[int]:
    """Slots of the index that have any block."""
    return [slot for slot, tiers in router.index.stats().entries.items() if sum(tiers.values())]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what is waited for is another's state
        await asyncio.sleep(0.005)
