"""Shared copies: every item once, errors to the caller, no thread waits for one that does not come."""

import os
import threading
from collections.abc import Callable

import numpy as np
import pytest

from dynamo.kernels.host_threads import HostThreads, copy_in_parts

MIB = 1 << 20
DEADLINE_S = 20.0


def counted(num_items: int) -> tuple[Callable[[int, int], None], "np.ndarray[tuple[int], np.dtype[np.int64]]"]:
    """A part copier that counts how often each item was copied."""
    counts = np.zeros(num_items, dtype=np.int64)

    def copy_part(start: int, stop: int) -> None:
        counts[start:stop] += 1

    return copy_part, counts


@pytest.mark.parametrize("num_helpers", [0, 1, 3])
@pytest.mark.parametrize(("num_items", "item_bytes"), [(0, MIB), (1, 64 * MIB), (5, 4 * MIB), (100_000, 300), (7, 0)])
def test_every_item_is_copied_once(num_helpers: int, num_items: int, item_bytes: int) -> None:
    copy_part, counts = counted(num_items)
    threads = HostThreads(num_helpers)
    threads.copy(num_items, item_bytes, copy_part)
    assert (counts == 1).all()


def test_small_copies_stay_on_the_calling_thread_in_one_part() -> None:
    parts: list[tuple[int, int, int]] = []
    HostThreads(2).copy(1000, 1024, lambda start, stop: parts.append((start, stop, threading.get_ident())))
    assert parts == [(0, 1000, threading.get_ident())]


def test_without_an_idle_core_the_caller_copies_alone_in_one_part() -> None:
    parts: list[tuple[int, int, int]] = []
    HostThreads(2, has_idle_core=lambda: False).copy(
        64, MIB, lambda start, stop: parts.append((start, stop, threading.get_ident()))
    )
    assert parts == [(0, 64, threading.get_ident())]


def test_helpers_take_part_and_parts_shrink() -> None:
    names: set[str] = set()
    sizes: list[int] = []
    helper_came = threading.Event()

    def copy_part(start: int, stop: int) -> None:
        names.add(threading.current_thread().name)
        sizes.append(stop - start)
        if threading.current_thread() is threading.main_thread():
            assert helper_came.wait(DEADLINE_S)
        else:
            helper_came.set()

    HostThreads(1).copy(64, MIB, copy_part)
    assert len(names) == 2
    assert sum(sizes) == 64
    assert sizes[0] == 16
    assert sizes[-1] == 1


def test_the_caller_does_not_wait_for_helpers_that_are_busy_elsewhere() -> None:
    threads = HostThreads(1)
    helper_is_held, release = threading.Event(), threading.Event()

    def hold_the_helper(start: int, stop: int) -> None:
        if threading.current_thread().name.startswith("kv-copy"):
            helper_is_held.set()
            assert release.wait(DEADLINE_S)
        else:
            assert helper_is_held.wait(DEADLINE_S)

    other = threading.Thread(target=threads.copy, args=(64, MIB, hold_the_helper))
    other.start()
    assert helper_is_held.wait(DEADLINE_S)
    copy_part, counts = counted(64)
    threads.copy(64, MIB, copy_part)
    assert (counts == 1).all()
    release.set()
    other.join(DEADLINE_S)
    assert not other.is_alive()


@pytest.mark.parametrize("where", ["caller", "helper"])
def test_an_error_reaches_the_caller_after_all_parts_have_ended(where: str) -> None:
    barrier = threading.Barrier(2)
    ended: list[str] = []

    def copy_part(start: int, stop: int) -> None:
        is_caller = threading.current_thread() is threading.main_thread()
        if start in (0, 16):  # the first part of each
            barrier.wait(DEADLINE_S)
        if is_caller == (where == "caller"):
            raise MemoryError("no room")
        ended.append(where)

    threads = HostThreads(1)
    with pytest.raises(MemoryError, match="no room"):
        threads.copy(64, MIB, copy_part)
    assert ended
    copy, counts = counted(64)
    threads.copy(64, MIB, copy)
    assert (counts == 1).all()


def test_many_threads_may_copy_at_a_time() -> None:
    def body(seed: int) -> None:
        src = np.random.default_rng(seed).integers(0, 256, 6 * MIB, dtype=np.uint8)
        dst = np.zeros_like(src)
        for _ in range(5):
            dst[:] = 0
            copy_in_parts(src.size, 1, lambda start, stop: np.copyto(dst[start:stop], src[start:stop]))
            results.append(bool((dst == src).all()))

    results: list[bool] = []
    callers = [threading.Thread(target=body, args=(seed,)) for seed in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(DEADLINE_S)
    assert results == [True] * 30


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking with threads is what is tested
def test_a_forked_child_copies_with_helpers_of_its_own() -> None:
    threads = HostThreads(1)
    threads.copy(*(64, MIB), counted(64)[0])
    child = os.fork()
    if child == 0:
        came = threading.Event()

        def copy_part(start: int, stop: int) -> None:
            if threading.current_thread() is threading.main_thread():
                came.wait(DEADLINE_S)
            else:
                came.set()

        try:
            threads.copy(64, MIB, copy_part)
        finally:
            os._exit(0 if came.is_set() else 1)
    assert os.waitpid(child, 0)[1] == 0
