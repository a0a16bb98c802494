"""Transfers whose deadline moves with what has arrived."""

import threading
import time

import numpy as np

from dynamo.tiers.mover import Mover, Transfer

WAIT_S = 20.0


def deliver(transfer: Transfer, *positions: int, good: bool = True) -> bool:
    places = np.array(positions, dtype=np.int64)
    return transfer.deliver(places, lambda: np.full(len(places), good, dtype=np.bool_))


def test_progress_counts_leading_blocks_and_only_when_there_are_more():
    transfer = Transfer(6, WAIT_S)
    seen: list[int] = []
    transfer.on_progress(seen.append)
    deliver(transfer, 1, 2)
    deliver(transfer, 0)
    deliver(transfer, 4)
    deliver(transfer, 3, good=False)
    deliver(transfer, 5)
    assert seen == [3]
    assert transfer.wait(0.0) == 3


def test_a_late_listener_is_told_at_once_what_has_arrived():
    transfer = Transfer(3, WAIT_S)
    deliver(transfer, 0, 1)
    seen: list[int] = []
    transfer.on_progress(seen.append)
    assert seen == [2]


def test_a_deadline_only_moves_back():
    transfer = Transfer(1, WAIT_S)
    first = transfer.deadline
    transfer.extend(first - 5.0)
    assert transfer.deadline == first
    transfer.extend(first + 5.0)
    assert transfer.deadline == first + 5.0


def test_the_mover_ends_an_extended_transfer_at_its_new_deadline():
    mover = Mover({"disk": 1})
    release = threading.Event()
    transfer = Transfer(2, 0.05)
    ended = threading.Event()
    transfer.when_ended(ended.set)

    def first() -> None:
        deliver(transfer, 0)

    def second() -> None:
        release.wait(WAIT_S)
        deliver(transfer, 1)

    transfer.on_progress(lambda count: transfer.extend(started + 0.3))
    started = time.monotonic()
    mover.submit(transfer, {"disk": [first, second]}, on_done=lambda: None)
    assert ended.wait(WAIT_S)
    assert time.monotonic() - started >= 0.3
    assert transfer.is_expired
    assert transfer.wait(0.0) == 1
    release.set()
    mover.close(WAIT_S)


def test_who_waits_goes_on_waiting_when_the_deadline_moves():
    transfer = Transfer(2, 0.1)
    wait_started = threading.Event()

    def extend_and_finish() -> None:
        wait_started.wait(WAIT_S)
        transfer.extend(time.monotonic() + WAIT_S)
        deliver(transfer, 0, 1)
        transfer.finish()

    helper = threading.Thread(target=extend_and_finish)
    helper.start()
    wait_started.set()
    assert transfer.wait() == 2
    assert not transfer.is_expired
    helper.join(WAIT_S)
