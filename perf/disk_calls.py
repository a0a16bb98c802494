"""Reads and writes of a disk, as many in flight as wanted, by threads or by the kernel's asynchronous I/O. Nothing else."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynamo.perf.harness import BenchmarkError
from dynamo.tiers.aio import READ, WRITE, RequestQueue, make_requests

__all__ = ["Call", "Rate", "open_queue", "run_calls", "run_requests"]

Call = tuple[int, list[memoryview], int]
"""File, memory and offset."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What one run moved."""

    num_bytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second."""
        return self.num_bytes / self.seconds / 1e9


def run_calls(calls: Sequence[Call], depth: int, *, writes: bool, limit_s: float = 1e9) -> Rate:
    """Makes calls of equal size in their order by `depth` threads, until all are made or the time is over.

    Raises:
        OSError: the disk refuses.
        BenchmarkError: a call moved less than it should.
    """
    call_bytes = len(calls[0][1][0])
    call = os.pwritev if writes else os.preadv
    queue = iter(calls)
    start, stop = threading.Event(), threading.Event()
    failures: list[Exception] = []
    counts = [0] * depth

    def work(index: int) -> None:
        start.wait()
        try:
            for fd, pieces, offset in queue:  # a list's iterator may be shared by threads
                if call(fd, pieces, offset) != call_bytes:
                    raise _too_few(call_bytes)
                counts[index] += 1
                if stop.is_set():
                    return
        except (OSError, BenchmarkError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(depth)]
    for thread in threads:
        thread.start()
    try:
        began = time.perf_counter()
        start.set()
        for thread in threads:
            thread.join(max(0.0, began + limit_s - time.perf_counter()))
    finally:
        stop.set()  # also when interrupted
        start.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return Rate(sum(counts) * call_bytes, time.perf_counter() - began)


def open_queue(depth: int) -> RequestQueue | None:
    """A queue of asynchronous requests; None where the system has none: threads are the best there is then."""
    try:
        return RequestQueue(depth)
    except OSError:
        return None


def run_requests(queue: RequestQueue, calls: Sequence[Call], depth: int, *, writes: bool, limit_s: float = 1e9) -> Rate:
    """Makes calls of equal size by one thread that keeps `depth` requests, at most the queue's depth, under way.

    Raises:
        OSError: the disk refuses, or there is no asynchronous I/O.
        BenchmarkError: a request moved less than it should.
    """
    call_bytes = len(calls[0][1][0])
    vectors = np.array(
        [(np.frombuffer(pieces[0], np.uint8).ctypes.data, call_bytes) for _, pieces, _ in calls], np.uint64
    )
    requests = make_requests(
        0, WRITE if writes else READ, vectors, np.arange(len(calls) + 1), np.array([offset for _, _, offset in calls])
    )
    requests["fd"] = [fd for fd, _, _ in calls]
    num_submitted = num_ended = 0
    results: list[int] = []
    began = time.perf_counter()
    num_wanted = len(calls)
    try:
        while num_ended < num_wanted:
            if room := min(depth - (num_submitted - num_ended), num_wanted - num_submitted):
                num_submitted += queue.submit(requests, num_submitted, num_submitted + room)
            num_open = num_submitted - num_ended
            events = queue.wait(num_open if num_submitted == num_wanted else -(-num_open // 4))
            num_ended += len(events)
            results += events["result"].tolist()
            if time.perf_counter() - began > limit_s:
                num_wanted = num_submitted
    finally:
        while num_ended < num_submitted:
            num_ended += len(queue.wait(num_submitted - num_ended))
    seconds = time.perf_counter() - began
    if (worst := min(results)) < 0:
        raise OSError(-worst, os.strerror(-worst))
    if worst != call_bytes:
        raise _too_few(call_bytes)
    return Rate(num_ended * call_bytes, seconds)


def _too_few(call_bytes: int) -> BenchmarkError:
    return BenchmarkError(f"the disk moved less than {call_bytes} bytes in one call")
