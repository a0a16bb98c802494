"""The mover: who goes first, how much at once, and that no completion is lost."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from dynamo.tiers.mover import PARTS_AT_ONCE, Lane, Mover, Part, Priority
from dynamo.tiers.transfer import Transfer

TIMEOUT_S = 10.0
Eventually = Callable[[Callable[[], bool]], None]


@contextmanager
def moving(max_link_bytes: int = 1 << 20, **num_threads: int) -> Iterator[Mover]:
    """A mover with one link for all lanes."""
    mover = Mover({name: Lane("link", count) for name, count in num_threads.items()}, max_link_bytes)
    yield mover
    mover.close(TIMEOUT_S)
    assert not any(thread.name.startswith("kv-lane") for thread in threading.enumerate())


class Gate:
    """A part that runs until it is opened."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.opened.wait(TIMEOUT_S), "nobody opened the gate"

    def hold(self, mover: Mover, lane: str, num_bytes: int = 1) -> Transfer:
        """Occupies one of the lane's threads."""
        transfer = submit(mover, lane, [self], num_bytes=num_bytes)
        assert self.begun.wait(TIMEOUT_S)
        return transfer


def nothing() -> None:
    pass


def submit(
    mover: Mover,
    lane: str,
    runs: list[Callable[[], None]],
    *,
    num_bytes: int = 1,
    priority: Priority = Priority.LOAD,
    timeout_s: float = TIMEOUT_S,
    on_done: Callable[[], None] = nothing,
) -> Transfer:
    transfer = Transfer(0, timeout_s)
    mover.submit(transfer, {lane: [Part(run, num_bytes) for run in runs]}, on_done, priority=priority)
    return transfer


def ended(transfer: Transfer) -> bool:
    transfer.wait()
    return not transfer.is_expired


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long enough for an exception from the order."""
    monkeypatch.setattr("dynamo.tiers.mover.GIVE_WAY_S", 1000.0)


@pytest.mark.usefixtures("patient")
def test_loads_go_before_prefetches_and_those_before_offloads() -> None:
    order: list[str] = []
    with moving(lane=1) as mover:
        gate = Gate()
        gate.hold(mover, "lane")
        transfers = [
            submit(mover, "lane", [lambda p=priority: order.append(p.name)] * 2, priority=priority)
            for priority in (Priority.OFFLOAD, Priority.PREFETCH, Priority.LOAD)
        ]
        gate.opened.set()
        assert all(map(ended, transfers))
    assert order == ["LOAD"] * 2 + ["PREFETCH"] * 2 + ["OFFLOAD"] * 2


@pytest.mark.usefixtures("patient")
def test_offloads_give_way_to_loads_in_other_lanes_of_their_link() -> None:
    order: list[str] = []
    with moving(lane=1, other=1) as mover:
        gate = Gate()
        load = gate.hold(mover, "lane")
        load.when_ended(lambda: order.append("load"))
        offload = submit(mover, "other", [lambda: order.append("offload")], priority=Priority.OFFLOAD)
        assert not order
        gate.opened.set()
        assert ended(offload)
    assert sorted(order) == ["load", "offload"]


def test_nothing_starves_behind_loads_that_never_end() -> None:
    with moving(lane=2) as mover:
        gate = Gate()
        gate.hold(mover, "lane")
        assert ended(submit(mover, "lane", [nothing], priority=Priority.OFFLOAD))
        assert ended(submit(mover, "lane", [nothing], priority=Priority.PREFETCH))
        gate.opened.set()


def test_a_short_transfer_does_not_wait_for_a_long_one() -> None:
    order: list[str] = []
    with moving(lane=1) as mover:
        gate = Gate()
        gate.hold(mover, "lane")
        long = submit(mover, "lane", [lambda: order.append("long")] * 50)
        short = submit(mover, "lane", [lambda: order.append("short")] * 2)
        gate.opened.set()
        assert ended(short)
        assert ended(long)
    assert order[:4] == ["long", "short", "long", "short"]


def test_a_transfer_has_two_parts_under_way_and_no_more() -> None:
    running = threading.Semaphore(0)
    go_on = threading.Event()
    num_begun = 0

    def run() -> None:
        nonlocal num_begun
        num_begun += 1
        running.release()
        assert go_on.wait(TIMEOUT_S)

    with moving(lane=4) as mover:
        transfer = submit(mover, "lane", [run] * 6)
        for _ in range(PARTS_AT_ONCE):
            assert running.acquire(timeout=TIMEOUT_S)
        assert ended(submit(mover, "lane", [nothing]))  # the other threads were free for it
        assert num_begun == PARTS_AT_ONCE
        go_on.set()
        assert ended(transfer)
    assert num_begun == 6


def test_a_lane_that_hangs_does_not_hold_up_another() -> None:
    with moving(lane=2, other=1) as mover:
        gates = [Gate(), Gate()]
        for gate in gates:
            gate.hold(mover, "lane")
        stuck = submit(mover, "lane", [nothing])
        assert ended(submit(mover, "other", [nothing]))
        assert not stuck.is_ended
        for gate in gates:
            gate.opened.set()
        assert ended(stuck)


def test_bytes_in_flight_are_bounded_but_a_part_of_any_size_has_its_turn() -> None:
    in_flight = most = 0
    lock = threading.Lock()

    def run(size: int) -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += size
            most = max(most, in_flight)
        with lock:
            in_flight -= size

    with moving(max_link_bytes=100, lane=4) as mover:
        transfers = [submit(mover, "lane", [lambda: run(40)] * 10, num_bytes=40) for _ in range(4)]
        assert all(map(ended, transfers))
        assert most <= 100
        assert ended(submit(mover, "lane", [lambda: run(1000)], num_bytes=1000))


def test_a_part_that_finds_too_few_bytes_left_waits_for_them() -> None:
    with moving(max_link_bytes=100, lane=2) as mover:
        gate = Gate()
        gate.hold(mover, "lane", num_bytes=60)
        large = submit(mover, "lane", [nothing], num_bytes=60)
        small = submit(mover, "lane", [nothing], num_bytes=1)
        assert not large.is_ended
        gate.opened.set()
        assert ended(large)
        assert ended(small)


@pytest.mark.parametrize("end", [Transfer.expire, Transfer.cancel], ids=["expire", "cancel"])
def test_parts_of_an_ended_transfer_are_not_begun_and_what_they_use_is_given_back_once(
    end: Callable[[Transfer], None], eventually: Eventually
) -> None:
    done: list[int] = []
    with moving(lane=1) as mover:
        gate = Gate()
        blocking = gate.hold(mover, "lane")
        waiting = submit(mover, "lane", [lambda: done.append(0)] * 5, on_done=lambda: done.append(1))
        running = submit(mover, "lane", [lambda: done.append(0)] * 3, on_done=lambda: done.append(2))
        end(waiting)
        assert done == [1]
        end(running)
        end(blocking)
        assert done == [1, 2]
        assert mover.num_unfinished == 1
        gate.opened.set()
        eventually(lambda: mover.num_unfinished == 0)
    assert done == [1, 2]


def test_on_done_waits_for_parts_that_had_begun() -> None:
    done = threading.Event()
    with moving(lane=1) as mover:
        gate = Gate()
        transfer = submit(mover, "lane", [gate, nothing], on_done=done.set)
        assert gate.begun.wait(TIMEOUT_S)
        transfer.cancel()
        assert not done.is_set()
        gate.opened.set()
        assert done.wait(TIMEOUT_S)


def test_transfers_without_parts_end_at_once() -> None:
    with moving(lane=1) as mover:
        done = threading.Event()
        transfer = submit(mover, "lane", [], on_done=done.set)
        assert done.is_set()
        assert transfer.is_ended


def test_a_failing_part_is_logged_and_the_others_run(caplog: pytest.LogCaptureFixture) -> None:
    ran = threading.Event()

    def fail() -> None:
        raise ValueError("a part's fault")

    with moving(lane=1) as mover:
        assert ended(submit(mover, "lane", [fail, ran.set]))
    assert ran.is_set()
    assert "a part of a KV transfer failed" in caplog.text


def test_a_transfer_ends_at_its_deadline_without_anybody_waiting(eventually: Eventually) -> None:
    with moving(lane=1) as mover:
        gate = Gate()
        gate.hold(mover, "lane")
        late = submit(mover, "lane", [nothing], timeout_s=0.05)
        eventually(lambda: late.is_ended)
        assert late.is_expired
        gate.opened.set()


def test_the_deadline_may_move_while_the_mover_watches_it(eventually: Eventually) -> None:
    with moving(lane=1) as mover:
        gate = Gate()
        gate.hold(mover, "lane")
        extended = submit(mover, "lane", [nothing], timeout_s=1.0)
        extended.extend(extended.deadline + TIMEOUT_S)
        later = submit(mover, "lane", [nothing], timeout_s=1.2)
        eventually(lambda: later.is_ended)
        assert not extended.is_ended
        gate.opened.set()
        assert ended(extended)


def test_a_line_runs_its_parts_one_after_the_other() -> None:
    order: list[int] = []
    all_ran = threading.Event()
    with moving(lane=3) as mover:
        line = mover.line("lane", Priority.OFFLOAD)
        for i in range(100):
            line.put(Part(lambda i=i: order.append(i), 1))
        line.put(Part(all_ran.set, 0))
        assert all_ran.wait(TIMEOUT_S)
    assert order == list(range(100))


def test_closing_runs_what_is_queued_and_leaves_a_hanging_thread_behind(caplog: pytest.LogCaptureFixture) -> None:
    with moving(lane=1) as mover:
        transfer = submit(mover, "lane", [nothing] * 20)
    assert transfer.is_ended
    mover = Mover({"stuck": Lane("link", 1)}, 1)
    gate = Gate()
    gate.hold(mover, "stuck")
    mover.close(0.05)
    assert "still run" in caplog.text
    gate.opened.set()


def test_what_hangs_while_closing_still_ends_at_its_deadline(eventually: Eventually) -> None:
    mover = Mover({"stuck": Lane("link", 1)}, 1)
    gate = Gate()
    gate.hold(mover, "stuck")
    late = submit(mover, "stuck", [nothing], timeout_s=0.2)
    mover.close(0.05)
    eventually(lambda: late.is_ended)
    assert late.is_expired
    gate.opened.set()


def test_a_closed_mover_ends_what_it_is_given_at_once() -> None:
    done: list[str] = []
    mover = Mover({"lane": Lane("link", 1)}, 1)
    mover.close(TIMEOUT_S)
    transfer = submit(mover, "lane", [lambda: done.append("run")], on_done=lambda: done.append("done"))
    assert transfer.is_ended
    assert done == ["done"]
    assert mover.num_unfinished == 0


def test_a_line_of_a_closed_mover_refuses_what_would_never_run() -> None:
    ran: list[int] = []
    mover = Mover({"lane": Lane("link", 1)}, 1)
    line = mover.line("lane", Priority.OFFLOAD)
    assert line.put(Part(lambda: ran.append(0), 1))
    mover.close(TIMEOUT_S)
    assert not line.put(Part(lambda: ran.append(1), 1))
    assert ran == [0]


def test_what_a_part_hands_on_to_another_lane_is_run_although_the_mover_closes(eventually: Eventually) -> None:
    mover = Mover({"first": Lane("link", 1), "second": Lane("other link", 1)}, 1)
    gate, arrived = Gate(), threading.Event()
    line = mover.line("second", Priority.OFFLOAD)

    def hand_on() -> None:
        gate()
        line.put(Part(arrived.set, 1))

    mover.line("first", Priority.OFFLOAD).put(Part(hand_on, 1))
    assert gate.begun.wait(TIMEOUT_S)
    mover.close(0.2)
    gate.opened.set()
    assert arrived.wait(TIMEOUT_S)
    eventually(lambda: not any(t.name.startswith(("kv-first", "kv-second")) for t in threading.enumerate()))
