"""Ctrl-C, SIGTERM and a terminal that is closed, during a benchmark."""

import contextlib
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupts", "put_off"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEARING_S = 30.0  # longer than servers and caches take to end
_PAUSE_S = 0.01  # until one that was lost comes again, and again until it is heard


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Has these signals wait for the end of the block, which must not be torn apart, such as the start of a process.

    For the main thread. Handlers are changed, not its mask: a signal may be taken by any thread.
    """
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _heeded() -> list[signal.Signals]:
    """Those that this process was not told to ignore, as by nohup."""
    return [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


class _Interrupt(KeyboardInterrupt):
    """One whose end can be seen: the builtin itself takes no weak reference."""


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP end what is run in this context, with a KeyboardInterrupt: none is lost, and none too many.

    Compiled code may drop an exception that is raised within it, as a part of numpy does that is imported when it is first
    used; so does a destructor. Nobody has the exception then any more, and the signal is sent again. While somebody has it,
    further signals are passed over for half a minute, lest an impatient second Ctrl-C cuts off the removal of folders and
    processes.

    For the main thread.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._raised: weakref.ref[_Interrupt] | None = None
        self._raised_s = 0.0
        self._number = signal.SIGINT
        self._threads: list[threading.Thread] = []
        self._is_losing = False
        self._has_ended = threading.Event()

    def __enter__(self) -> Self:
        for number in _heeded():
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._raised = None  # it may end now: it was not lost
        for thread in self._threads:  # what comes after this would meet other handlers, or none
            thread.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process that ended for the signal that came."""
        return 128 + self._number

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._is_losing or self._has_ended.is_set():
            return
        if self._raised is None or now >= self._raised_s + _CLEARING_S:
            self._number, self._raised_s = signal.Signals(number), now
            raise self._watched()

    def _watched(self) -> _Interrupt:
        # Made here, since the frame that raises it lives as long as its traceback: no name there may hold on to it.
        interrupt = _Interrupt()
        self._raised = weakref.ref(interrupt, self._send_again)
        return interrupt

    def _send_again(self, _: object) -> None:
        self._is_losing = True  # so it comes later and from a thread: what is raised here would be lost as well
        self._raised = None
        if not self._has_ended.is_set():
            thread = threading.Thread(target=self._send, name="perf-interrupt", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._is_losing = False

    def _send(self) -> None:
        main = threading.main_thread().ident
        assert main is not None, "the main thread runs"
        while not self._has_ended.wait(_PAUSE_S) and self._raised is None:
            signal.pthread_kill(main, self._number)
