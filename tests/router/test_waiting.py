"""The waiting room: order, deadlines, cancellation, and that nothing is left behind."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.router.errors import (
    AllBusyError,
    NoWorkersError,
    PinnedWorkerError,
    WaitedTooLongError,
    WaitingRoomFullError,
)
from dynamo.router.waiting import WaitingRoom
from dynamo.router.workers import LoadReport


class RememberingLoop(asyncio.SelectorEventLoop):
    """An event loop that knows which timers it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.timers: list[asyncio.TimerHandle] = []

    def call_at(self, when, callback, *args, context=None):
        self.timers.append(super().call_at(when, callback, *args, context=context))
        return self.timers[-1]


def run(scenario) -> None:
    with asyncio.Runner(loop_factory=RememberingLoop) as runner:
        runner.run(scenario)


def pending_timers() -> int:
    """Timers of the running loop that would still fire."""
    loop = asyncio.get_running_loop()
    return sum(not timer.cancelled() and timer.when() > loop.time() for timer in loop.timers)


@pytest.fixture
def make_busy(make_fleet):
    """One worker, w0, that takes a single request, and the booking of that one."""

    def make(**settings):
        fleet = make_fleet(0, busy_requests=1.0, **settings)
        fleet.join("w0", max_running=1)
        return fleet, WaitingRoom(fleet.router, clock=fleet.clock), fleet.route([1])[1]

    return make


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_request_that_finds_room_does_not_wait(make_fleet):
    async def scenario():
        fleet = make_fleet(1)
        room = WaitingRoom(fleet.router)
        decision, booking = await room.route(fleet.query([1]))
        assert decision.worker_id == "w0"
        booking.free()
        assert room.stats().outcomes == {"at-once": 1}
        assert pending_timers() == 0

    run(scenario())


def test_higher_priorities_go_first_and_equals_in_order(make_busy):
    async def scenario():
        fleet, room, booking = make_busy()
        served = []

        async def request(name: str, priority: int) -> None:
            _, booked = await room.route(fleet.query([2]), priority=priority)
            served.append(name)
            await asyncio.sleep(0)
            booked.free()

        tasks = []
        for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)):
            tasks.append(asyncio.create_task(request(name, priority)))
            await settle()
        assert room.stats().num_waiting == {5: 2, 0: 2, -1: 1}
        booking.free()
        await asyncio.gather(*tasks)
        assert served == ["b", "d", "a", "c", "e"]
        assert room.stats().outcomes == {"waited": 5}
        assert fleet.router.stats().num_bookings == 0
        assert (len(room), pending_timers()) == (0, 0)

    run(scenario())


def test_nobody_overtakes_those_who_wait(make_busy):
    async def scenario():
        fleet, room, booking = make_busy()
        first = asyncio.create_task(room.route(fleet.query([2])))
        await settle()
        booking.free()  # the room is woken soon, but a request comes before that
        second = asyncio.create_task(room.route(fleet.query([3])))
        await settle()
        assert first.done()
        assert not second.done()
        first.result()[1].free()
        (await second)[1].free()

    run(scenario())


def test_a_deadline_ends_the_wait(make_busy):
    async def scenario():
        fleet, room, booking = make_busy()
        with pytest.raises(WaitedTooLongError) as caught:
            await room.route(fleet.query([2]), timeout_s=0.01)
        assert caught.value.waited_s == 0  # on the test's clock
        assert room.stats().outcomes == {"too-long": 1}
        assert (len(room), pending_timers()) == (0, 0)
        booking.free()
        assert fleet.router.stats().num_bookings == 0

    run(scenario())


def test_a_full_room_refuses_unless_the_newcomer_matters_more(make_busy):
    async def scenario():
        fleet, room, booking = make_busy(max_waiting=2)
        early = asyncio.create_task(room.route(fleet.query([2])))
        late = asyncio.create_task(room.route(fleet.query([3])))
        await settle()
        with pytest.raises(WaitingRoomFullError, match="2 requests wait"):
            await room.route(fleet.query([4]))
        important = asyncio.create_task(room.route(fleet.query([5]), priority=1))
        await settle()
        with pytest.raises(WaitingRoomFullError, match="more important"):
            await late
        booking.free()
        (await important)[1].free()
        (await early)[1].free()
        assert room.stats().outcomes == {"full": 1, "displaced": 1, "waited": 2}

    run(scenario())


def test_a_room_without_places_refuses_at_once(make_busy):
    async def scenario():
        fleet, room, _ = make_busy(max_waiting=0)
        with pytest.raises(WaitingRoomFullError):
            await room.route(fleet.query([2]))

    run(scenario())


def test_cancelling_while_waiting_books_nothing(make_busy):
    async def scenario():
        fleet, room, booking = make_busy()
        task = asyncio.create_task(room.route(fleet.query([2])))
        await settle()
        assert pending_timers() == 2  # its deadline, and the room's look around
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        booking.free()
        await settle()
        assert fleet.router.stats().num_bookings == 0
        assert room.stats().outcomes == {"cancelled": 1}
        assert (len(room), pending_timers()) == (0, 0)

    run(scenario())


def test_cancelling_at_the_moment_of_success_frees_what_was_booked(make_busy):
    async def scenario():
        fleet, room, booking = make_busy()
        task = asyncio.create_task(room.route(fleet.query([2])))
        await settle()
        booking.free()
        await asyncio.sleep(0)  # the room has served it; its task has not run yet
        assert fleet.router.stats().num_bookings == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fleet.router.stats().num_bookings == 0
        assert room.stats().outcomes == {"waited": 0, "cancelled": 1}

    run(scenario())


def test_a_request_with_wishes_does_not_hold_up_the_others(make_busy):
    async def scenario():
        fleet, room, booking = make_busy()
        fleet.join("w1", max_running=1)
        other = fleet.route([1], pin="w1")[1]
        pinned = asyncio.create_task(room.route(fleet.query([2], pin="w0"), priority=9))
        free = asyncio.create_task(room.route(fleet.query([3])))
        await settle()
        other.free()
        decision, booked = await free
        assert decision.worker_id == "w1"
        assert not pinned.done()
        booking.free()
        assert (await pinned)[0].worker_id == "w0"
        booked.free()

    run(scenario())


def test_a_joining_worker_and_a_better_report_wake_the_room(make_busy):
    async def scenario():
        fleet, room, _ = make_busy()
        first = asyncio.create_task(room.route(fleet.query([2])))
        await settle()
        fleet.join("w1", max_running=1)
        assert (await first)[0].worker_id == "w1"
        fleet.join("w2", max_running=1)
        fleet.router.report("w2", LoadReport(num_running=1, num_waiting=0, prefill_tokens_waiting=0))
        second = asyncio.create_task(room.route(fleet.query([3])))
        await settle()
        assert not second.done()
        fleet.router.report("w2", LoadReport(num_running=0, num_waiting=0, prefill_tokens_waiting=0))
        assert (await second)[0].worker_id == "w2"

    run(scenario())


def test_a_report_that_grows_old_frees_those_who_wait_without_any_event(make_fleet):
    async def scenario():
        fleet = make_fleet(0, busy_requests=1.0)
        fleet.join("w0", max_running=1)
        fleet.router.report("w0", LoadReport(num_running=1, num_waiting=0, prefill_tokens_waiting=0))
        room = WaitingRoom(fleet.router, clock=fleet.clock)
        task = asyncio.create_task(room.route(fleet.query([2])))
        await settle()
        assert not task.done()
        fleet.clock.now_s += 60
        async with asyncio.timeout(10):
            assert (await task)[0].worker_id == "w0"
        assert pending_timers() == 0

    run(scenario())


def test_those_who_wait_learn_that_the_workers_left(make_busy):
    async def scenario():
        fleet, room, _ = make_busy()
        task = asyncio.create_task(room.route(fleet.query([2])))
        await settle()
        fleet.router.leave("w0")
        async with asyncio.timeout(10):
            with pytest.raises(NoWorkersError):
                await task
        assert room.stats().outcomes == {"no-worker": 1}

    run(scenario())


def test_errors_other_than_busy_do_not_wait(make_busy):
    async def scenario():
        fleet, room, _ = make_busy()
        with pytest.raises(PinnedWorkerError):
            await room.route(fleet.query([2], pin="w9"))
        waiting = asyncio.create_task(room.route(fleet.query([2])))
        await settle()
        with pytest.raises(PinnedWorkerError):
            await room.route(fleet.query([2], pin="w9"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(-2, 2)),
        st.tuples(st.just("free"), st.integers(0, 9)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("leave"), st.integers(0, 1)),
        st.tuples(st.just("join"), st.integers(0, 1)),
        st.tuples(st.just("settle"), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(steps=STEPS)
def test_whatever_happens_every_request_ends_and_nothing_stays_booked(make_fleet, steps):
    async def scenario():
        fleet = make_fleet(0, busy_requests=1.0, max_waiting=4)
        room = WaitingRoom(fleet.router, clock=fleet.clock)
        fleet.join("w0", max_running=2)
        tasks: list[asyncio.Task] = []
        for epoch, (step, number) in enumerate(steps):
            if step == "ask":
                tasks.append(asyncio.create_task(room.route(fleet.query([epoch]), priority=number)))
            elif step == "free" and tasks:
                task = tasks[number % len(tasks)]
                if task.done() and not task.cancelled() and task.exception() is None:
                    task.result()[1].free()
            elif step == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif step == "leave":
                fleet.router.leave(f"w{number}")
            elif step == "join":
                fleet.join(f"w{number}", max_running=2, epoch=epoch + 2)
            else:
                await asyncio.sleep(0)
            assert len(room) <= 4
            fleet.router.check_invariants()
        await settle()
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for result in done:
            if isinstance(result, tuple):
                result[1].free()
            else:
                assert isinstance(result, asyncio.CancelledError | WaitingRoomFullError | NoWorkersError | AllBusyError)
        assert fleet.router.stats().num_bookings == 0
        assert (len(room), pending_timers()) == (0, 0)
        outcomes = room.stats().outcomes
        assert all(count >= 0 for count in outcomes.values())

    run(scenario())
