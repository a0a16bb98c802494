import os
import signal
import subprocess
import sys
from collections.abc import Callable

from dynamo.serve.process_identity import is_running, machine_id, start_ticks


def test_this_process_runs_and_its_pid_at_another_time_does_not() -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    assert is_running(os.getpid(), ticks)
    assert not is_running(os.getpid(), ticks - 1)
    assert machine_id() == machine_id() != ""


def test_a_killed_process_does_not_run_even_while_nobody_has_waited_for_it(
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = start_ticks(child.pid)
    assert ticks is not None
    child.send_signal(signal.SIGKILL)
    eventually(lambda: not is_running(child.pid, ticks))
    child.communicate()
    assert start_ticks(child.pid) is None
