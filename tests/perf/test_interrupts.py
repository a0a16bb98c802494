"""No interrupt is lost, and none comes while another is on its way."""

import contextlib
import os
import signal
import sys
import time

import pytest

from dynamo.perf.interrupts import Interrupts, put_off

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
        time.sleep(0.05)  # longer than until a lost one comes again
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
