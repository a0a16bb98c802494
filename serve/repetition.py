"""Warnings that any client can cause as often as it likes must not fill the log."""

import logging
import time
from collections.abc import Callable

__all__ = ["RepetitionFilter"]

_PERIOD_S = 60.0


class RepetitionFilter(logging.Filter):
    """Lets each warning through once a minute; what is no warning always passes. For loggers whose messages are few.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._last_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        # The unformatted message: its arguments may differ each time, and would make this grow.
        message, now_s = str(record.msg), self._clock()
        last_s = self._last_s.get(message)
        if last_s is not None and now_s - last_s < _PERIOD_S:
            return False
        self._last_s[message] = now_s
        return True
