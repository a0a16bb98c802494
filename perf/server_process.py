"""`python -m dynamo.serve` as a child process, for benchmarks."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import Self

from dynamo.perf.harness import BenchmarkError
from dynamo.perf.interrupts import put_off

__all__ = ["ServerProcess"]

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_URL = re.compile(r"http://127\.0\.0\.1:\d+")


class ServerProcess:
    """A server on a free port of the loopback interface. Ready when the constructor returns; ended by `close`.

    Raises:
        BenchmarkError: it ended, or was not ready within a minute. The message holds its last lines.
    """

    def __init__(self, *flags: str) -> None:
        self._lines: deque[str] = deque(maxlen=20)
        self._heard = threading.Event()  # set when the URL was printed, or nothing more will be
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        with contextlib.ExitStack() as undo:
            with put_off():  # until there is what `close` ends
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "dynamo.serve", "--port", "0", *flags],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                self._reader.start()
                undo.callback(self.close)
            self._heard.wait(_START_TIMEOUT_S)
            if not self.url:
                self.close()
                said = "".join(self._lines).strip() or "nothing"
                raise BenchmarkError(f"python -m dynamo.serve {' '.join(flags)} did not start; it said:\n{said}")
            undo.pop_all()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stops the server, with SIGKILL if it does not end in time. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        """Reads to the end, so that the server never blocks on a full pipe."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if not self.url and (match := _URL.search(line)):
                self.url = match[0]
                self._heard.set()
        self._heard.set()
