"""Slots through the kernel's queue: what is special to it. What it shares with threads is in test_file_io.py."""

import errno
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dynamo.kernels.checks import Rows
from dynamo.tiers.aio import Events, RequestQueue, Requests
from dynamo.tiers.arena import map_rows
from dynamo.tiers.block_file import BlockFile
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.queued_io import QueuedIO

NUM_SLOTS = 600  # scattered, more than may be open at a time


@pytest.fixture
def file(tmp_path: Path) -> Iterator[BlockFile]:
    file = BlockFile(tmp_path / "blocks.dat")
    yield file
    file.close()


class CountingQueue(RequestQueue):
    """Counts what is under way."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.num_open = self.most_open = 0
        self.is_closed = False

    def submit(self, requests: Requests, start: int, stop: int) -> int:
        count = super().submit(requests, start, stop)
        self.num_open += count
        self.most_open = max(self.most_open, self.num_open)
        return count

    def wait(self, count: int) -> Events:
        events = super().wait(count)
        self.num_open -= len(events)
        return events

    def close(self) -> None:
        assert not self.num_open
        self.is_closed = True
        super().close()


class Queues:
    """Makes and remembers queues."""

    def __init__(self, kind: type[RequestQueue] = CountingQueue) -> None:
        self.kind = kind
        self.made: list[RequestQueue] = []

    def __call__(self, depth: int) -> RequestQueue:
        self.made.append(self.kind(depth))
        return self.made[-1]


def test_more_slots_than_may_be_open_arrive_and_a_queue_is_used_again(file: BlockFile, layout: BlockLayout) -> None:
    source, target = map_rows(layout, NUM_SLOTS), map_rows(layout, NUM_SLOTS)
    source[:] = np.random.default_rng(1).integers(0, 256, source.shape, dtype=np.uint8)
    slots = 2 * np.random.default_rng(2).permutation(NUM_SLOTS)  # no two are neighbours: a request each
    queues = Queues()
    io = QueuedIO(2, queues)
    for _ in range(3):
        assert io.start(file, slots, source, np.arange(NUM_SLOTS), writes=True).result().outcomes.all()
        target[:] = 0
        assert io.start(file, slots, target, np.arange(NUM_SLOTS), writes=False).result().outcomes.all()
        assert (source == target).all()
    (queue,) = queues.made
    assert isinstance(queue, CountingQueue)
    assert queue.most_open == queue.depth < NUM_SLOTS
    assert not queue.is_closed
    io.close()
    assert queue.is_closed


def test_batches_under_way_at_the_same_time_have_a_queue_each(file: BlockFile, layout: BlockLayout, rows: Rows) -> None:
    file.path.write_bytes(rows.tobytes() * 2)
    queues = Queues()
    io = QueuedIO(2, queues)
    targets = [map_rows(layout, 32) for _ in range(3)]
    slots = 2 * np.random.default_rng(1).permutation(32)
    pending = [io.start(file, slots, target, np.arange(32), writes=False) for target in targets]
    assert len(queues.made) == 3
    for each, target in reversed(list(zip(pending, targets, strict=True))):
        assert each.result().outcomes.all()
        assert (target == rows[slots % 32]).all()
    io.start(file, slots, targets[0], np.arange(32), writes=False).result()
    assert len(queues.made) == 3
    io.close()


def test_a_single_call_takes_no_queue(file: BlockFile, rows: Rows) -> None:
    queues = Queues()
    io = QueuedIO(2, queues)
    assert io.start(file, np.arange(5), rows, np.arange(5), writes=True).result().outcomes.all()
    assert queues.made == []
    io.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EAGAIN])
def test_where_the_kernel_makes_no_queue_threads_do_the_work(
    file: BlockFile, rows: Rows, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    caplog.set_level(logging.INFO)
    num_asked = 0

    def refuse(_: int) -> RequestQueue:
        nonlocal num_asked
        num_asked += 1
        raise OSError(number, os.strerror(number))

    io = QueuedIO(2, refuse)
    before = rows.copy()
    slots = np.arange(0, 64, 2)
    for _ in range(2):
        assert io.start(file, slots, rows, np.arange(32), writes=True).result().outcomes.all()
        rows[:] = 0
        assert io.start(file, slots, rows, np.arange(32), writes=False).result().outcomes.all()
        assert (rows == before).all()
    assert num_asked == 1
    assert len([record for record in caplog.records if "no asynchronous I/O" in record.message]) == 1
    io.close()


class StubbornQueue(CountingQueue):
    """Takes ten requests and then no more."""

    num_left = 10

    def submit(self, requests: Requests, start: int, stop: int) -> int:
        if not self.num_left:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        count = super().submit(requests, start, min(stop, start + self.num_left))
        self.num_left -= count
        return count


def test_what_the_kernel_does_not_take_is_read_by_calls(file: BlockFile, rows: Rows) -> None:
    file.path.write_bytes(rows.tobytes() * 2)
    expected = rows.copy()
    slots = np.arange(1, 64, 2)
    queues = Queues(StubbornQueue)
    io = QueuedIO(2, queues)
    for _ in range(2):
        rows[:] = 0
        result = io.start(file, slots, rows, np.arange(32), writes=False).result()
        assert result.outcomes.all()
        assert result.faults == {}
        assert (rows == expected[slots % 32]).all()
    assert len(queues.made) == 1
    io.close()


class FullQueue(CountingQueue):
    """Has room for five."""

    def submit(self, requests: Requests, start: int, stop: int) -> int:
        if self.num_open >= 5:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return super().submit(requests, start, min(stop, start + 5 - self.num_open))


def test_a_full_queue_is_asked_again_when_some_have_ended(file: BlockFile, rows: Rows) -> None:
    file.path.write_bytes(rows.tobytes() * 2)
    queues = Queues(FullQueue)
    io = QueuedIO(2, queues)
    for _ in range(2):
        assert io.start(file, np.arange(1, 64, 2), rows, np.arange(32), writes=False).result().outcomes.all()
    (queue,) = queues.made
    assert isinstance(queue, FullQueue)
    assert queue.most_open == 5
    io.close()


class InterruptedQueue(CountingQueue):
    """Ctrl-C comes while somebody waits."""

    is_first = True

    def wait(self, count: int) -> Events:
        if self.is_first:
            self.is_first = False
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # where the handler runs
        return super().wait(count)


def test_after_an_interruption_nothing_is_under_way(file: BlockFile, rows: Rows) -> None:
    file.path.write_bytes(rows.tobytes() * 2)
    queues = Queues(InterruptedQueue)
    io = QueuedIO(2, queues)
    pending = io.start(file, np.arange(1, 64, 2), rows, np.arange(32), writes=False)
    with pytest.raises(KeyboardInterrupt):
        pending.result()
    (queue,) = queues.made
    assert isinstance(queue, InterruptedQueue)
    assert queue.num_open == 0
    assert io.start(file, np.arange(1, 64, 2), rows, np.arange(32), writes=False).result().outcomes.all()
    io.close()
    assert queue.is_closed


def test_a_batch_begun_before_close_ends_and_its_queue_with_it(file: BlockFile, rows: Rows) -> None:
    file.path.write_bytes(rows.tobytes() * 2)
    queues = Queues()
    io = QueuedIO(2, queues)
    pending = io.start(file, np.arange(1, 64, 2), rows, np.arange(32), writes=False)
    io.close()
    io.close()
    (queue,) = queues.made
    assert isinstance(queue, CountingQueue)
    assert not queue.is_closed
    assert pending.result().outcomes.all()
    assert queue.is_closed
    assert io.start(file, np.arange(1, 64, 2), rows, np.arange(32), writes=False).result().outcomes.all()
    assert len(queues.made) == 1


def test_a_request_beyond_the_end_is_truncated(file: BlockFile, rows: Rows) -> None:
    file.path.write_bytes(rows[:10].tobytes() + bytes(1000))
    io = QueuedIO(2)
    result = io.start(file, np.array([8, 3, 10, 30]), rows, np.arange(4), writes=False).result()
    assert result.outcomes.tolist() == [True, True, False, False]
    assert result.faults == {"truncated": 2}
    io.close()
