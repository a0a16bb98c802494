"""Timing, statistics and the CPU time of other processes."""

import gc
import os
import subprocess
import sys
import time

import pytest

from dynamo.perf.harness import median, percentile, process_tree_cpu_s, quiet_collector, timed

SPIN = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_timed_tells_cpu_from_wall_time() -> None:
    busy = timed(lambda: spin(0.02))
    assert 0.02 <= busy.cpu_s <= busy.wall_s + 0.01
    idle = timed(lambda: time.sleep(0.03))
    assert idle.wall_s >= 0.03
    assert idle.cpu_s < 0.02


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (1, 1.0), (50, 2.0), (51, 3.0), (75, 3.0), (99, 4.0), (100, 4.0)]
)
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == expected


def test_percentile_of_one_value_is_that_value() -> None:
    assert percentile([7.0], 50) == 7.0


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_median_of_an_even_number_is_between_the_middle_two() -> None:
    assert median([1, 10, 2, 4]) == 3.0


def test_quiet_collector_leaves_the_collector_on_and_thaws() -> None:
    with quiet_collector():
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_process_tree_counts_children() -> None:
    code = (
        f"import subprocess, sys\nchild = {SPIN!r} + 'print(1, flush=True); input()'\n"
        "subprocess.run([sys.executable, '-c', child])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdout.readline()  # the grandchild has used its time and waits
        assert process_tree_cpu_s(parent.pid) >= 0.2
        parent.stdin.write(b"\n")
        parent.stdin.close()


def test_process_tree_of_an_ended_process_is_an_error() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    with pytest.raises(ProcessLookupError, match=str(done.pid)):
        process_tree_cpu_s(done.pid)


def test_own_cpu_time_agrees_with_the_clock() -> None:
    before, clock = process_tree_cpu_s(os.getpid()), time.process_time()
    spin(0.1)
    measured, expected = process_tree_cpu_s(os.getpid()) - before, time.process_time() - clock
    assert measured == pytest.approx(expected, abs=0.05)
