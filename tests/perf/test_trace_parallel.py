"""Replays on several cores: the same results in the same order, and a child that dies is told."""

import os
import signal
from functools import partial

import numpy as np
import pytest

from dynamo.perf.harness import BenchmarkError
from dynamo.perf.trace_parallel import replay_all
from dynamo.perf.trace_replay import Replay


def numbered(number: int) -> Replay:
    return Replay(np.array([number, number]), number, float(os.getpid()))


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks(num_processes: int) -> None:
    done = replay_all([partial(numbered, number) for number in range(7)], num_processes)
    assert [replay.num_written for replay in done] == list(range(7))
    assert [replay.found.tolist() for replay in done] == [[number, number] for number in range(7)]
    assert (float(os.getpid()) in {replay.cpu_s for replay in done}) == (num_processes == 1)


def test_no_tasks_are_no_results() -> None:
    assert replay_all([]) == []


def test_a_child_that_is_killed_is_told() -> None:
    def die() -> Replay:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    with pytest.raises(BenchmarkError, match=r"1 of 4 replays did not end \(exit codes .*-9"):
        replay_all([die, *(partial(numbered, number) for number in range(3))], 2)
