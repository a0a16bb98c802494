"""No interrupt is lost, and none comes while another is on its way."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dynamo.perf.interrupts import Interrupts, put_off
from dynamo.perf.kernels_measure import busy_core
from dynamo.perf.kernels_sections import Section, run_section
from dynamo.perf.kernels_workload import Workload
from dynamo.perf.nvidia_peer import NvidiaServing
from dynamo.perf.peer_process import PeerProcess

TIMEOUT_S = 30.0


def wait_for_ever() -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_and_says_which_it_was(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts:
        os.kill(os.getpid(), number)
        wait_for_ever()
    assert interrupts.exit_status == 128 + number
    assert signal.getsignal(number) == before


def test_an_interrupt_that_was_dropped_comes_again() -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Interrupts():
        for _ in range(2):  # as compiled code does that goes on after any error
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                wait_for_ever()
        wait_for_ever()
    assert time.monotonic() - began < TIMEOUT_S


def test_nothing_comes_after_the_end() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        for _ in range(20):
            with Interrupts(), contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                wait_for_ever()
            assert all(thread.name != "perf-interrupt" for thread in threading.enumerate()), "one could still be sent"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == []


def test_an_interrupt_that_a_destructor_dropped_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's keeps it

    class Resource:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for_ever()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Interrupts():
        Resource()
        wait_for_ever()
    assert time.monotonic() - began < TIMEOUT_S


def test_a_second_signal_does_not_cut_off_what_the_first_has_removed() -> None:
    is_removed = False
    with pytest.raises(KeyboardInterrupt), Interrupts():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for_ever()
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # where a signal would be seen
            is_removed = True
    assert is_removed


def test_what_was_ignored_is_still_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_is_put_off_comes_at_the_end_of_the_block() -> None:
    is_whole = False
    with pytest.raises(KeyboardInterrupt), Interrupts():
        with put_off():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
            is_whole = True
        wait_for_ever()
    assert is_whole


def start_section() -> None:
    list(run_section(Section("s", "", "no:where"), Workload(1, 1, "cpu"), Console(quiet=True)))


def start_peer() -> None:
    PeerProcess("a project", "module", "--flag", [sys.executable, "-c", "input()"]).close()


def start_nvidia() -> None:
    NvidiaServing(Path(sys.executable), "1").close()


def start_busy_core() -> None:
    with busy_core():
        wait_for_ever()


@pytest.fixture
def interrupted_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list["subprocess.Popen[Any]"]]:
    """Processes, which take until they are ended; a signal comes as soon as there is one."""
    started: list[subprocess.Popen[Any]] = []
    start = subprocess.Popen

    def interrupted(_: object, **options: Any) -> "subprocess.Popen[Any]":
        started.append(start([sys.executable, "-S", "-c", f"import time; time.sleep({TIMEOUT_S})"], **options))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # where a signal would be seen
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    yield started
    for process in started:
        with process:
            process.kill()


@pytest.mark.parametrize("run", [start_section, start_peer, start_nvidia, start_busy_core])
def test_a_signal_while_a_process_starts_leaves_none(
    interrupted_starts: list["subprocess.Popen[Any]"], run: Callable[[], None]
) -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        run()
    assert [process.returncode is not None for process in interrupted_starts] == [True]
