"""Ctrl-C and SIGTERM during a benchmark."""

import signal
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupts"]


class Interrupts:
    """SIGINT and SIGTERM end a run, and none is lost.

    Compiled code may drop the KeyboardInterrupt that is raised within it, as a part of numpy does that is imported when it is
    first used. So it is remembered too, and raised again before the next step. For the main thread.
    """

    def __init__(self) -> None:
        self._came = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt if one came."""
        if self._came:
            raise KeyboardInterrupt

    def _handle(self, _: int, __: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt
