"""A server as a child of a benchmark."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from dynamo.perf.interrupts import Interrupts
from dynamo.perf.server_process import ServerProcess

TIMEOUT_S = 30.0


def test_an_interrupt_while_it_starts_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, silent = tmp_path / "pid", tmp_path / "silent"
    silent.write_text(f"#!/bin/sh\necho $$ > {started}\nexec sleep {TIMEOUT_S:g}\n")
    silent.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(silent))

    def interrupt() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not (started.exists() and started.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt), Interrupts():
        thread.start()
        ServerProcess()
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
