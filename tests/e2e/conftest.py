"""The real server as a process of its own, with the demo model and tiers of chosen sizes."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_START_TIMEOUT_S = 60.0


@dataclass
class ServerProcess:
    """`python -m dynamo.serve` on a free port."""

    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)

    @classmethod
    def start(cls, *flags: str, file_size_limit: int | None = None) -> "ServerProcess":
        """Starts the server and waits until it listens.

        Args:
            file_size_limit: largest file it may write, in bytes: a full disk that needs no disk.
        """

        def limit() -> None:
            if file_size_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))

        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dynamo.serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            preexec_fn=limit,
        )
        server = cls(process)
        server._reader.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not server.url:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError("the server did not start:\n" + "".join(server.output))
            time.sleep(0.02)
        return server

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.output.append(line)
                if match := re.search(r"listening\s+(http://\S+)", line):
                    self.url = match[1]

    def complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        """Greedy completion of token ids, not streamed."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **options}
        return self.post("/v1/completions", body)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A JSON request to the demo model and its JSON answer."""
        data = json.dumps({"model": "demo", **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels as printed."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def settle(self) -> None:
        """Waits until nothing is on its way to the lower tiers."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            metrics = self.metrics()
            if (
                not metrics["dynamo_kvcache_pending_offload_blocks"]
                and not metrics["dynamo_kvcache_pending_disk_blocks"]
            ):
                return
            time.sleep(0.05)
        raise AssertionError("offloading did not end")

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=10) as response:
                return bool(response.status == 200)
        except urllib.error.URLError:
            return False

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(timeout=10)
        self._reader.join(timeout=10)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that are ended with the test."""
    with ExitStack() as stack:

        def start(*flags: str, **options: Any) -> ServerProcess:
            server = ServerProcess.start(*flags, **options)
            stack.callback(server.kill)
            return server

        yield start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for the disk tier."""
    return tmp_path / "kv"
