"""NVIDIA Dynamo's frontend with one worker of its mocker: the peer of a front and a worker of ours.

`ai-dynamo` and `ai-dynamo-runtime` live in an environment of their own, since their package is called `dynamo` too. They find
each other through a folder; no service is needed.
"""

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from dynamo.perf.harness import BenchmarkError
from dynamo.perf.interrupts import put_off
from dynamo.serve import demo

__all__ = ["NvidiaServing"]

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_MODEL = "demo"


class NvidiaServing:
    """Both processes, on a free port of the loopback interface. Ready when the constructor returns; ended by `close`.

    Attributes:
        url: of the frontend.
        model: the name that it serves.
    """

    def __init__(self, python: Path, speedup: str) -> None:
        """Starts them.

        Args:
            python: interpreter that has `ai-dynamo`.
            speedup: the mocker's --speedup-ratio: 1 is an 8B model on a GPU.

        Raises:
            BenchmarkError: they do not start within a minute. The message holds what they said last.
        """
        self.model = _MODEL
        self._folder = tempfile.TemporaryDirectory(prefix="dynamo-peer-")
        self._processes: list[subprocess.Popen[bytes]] = []
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        model = Path(demo.__file__).parent / "model"
        discovery = ("--discovery-backend", "file")
        try:
            self._start(python, "frontend", *discovery, "--http-host", "127.0.0.1", "--http-port", str(port))
            name = ("--model-path", str(model), "--model-name", _MODEL)
            self._start(python, "mocker", *discovery, *name, "--speedup-ratio", speedup)
            self._await_answer(port)
        except BaseException:
            self.close()
            raise

    @property
    def frontend_pid(self) -> int:
        """Process id of the frontend."""
        return self._processes[0].pid

    @property
    def worker_pid(self) -> int:
        """Process id of the mocker."""
        return self._processes[1].pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends both. Idempotent."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def _start(self, python: Path, part: str, *flags: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        # A signal waits until there is what `close` ends.
        with (Path(self._folder.name) / f"{part}.log").open("wb") as log, put_off():
            try:
                process = subprocess.Popen(
                    [python, "-m", f"dynamo.{part}", *flags],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._folder.name,
                    env=inherited | {"DYN_FILE_KV": str(Path(self._folder.name) / "discovery")},
                )
            except OSError as error:
                raise BenchmarkError(f"--dynamo-python {python} does not start: {error}") from error
            self._processes.append(process)

    def _await_answer(self, port: int) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and all(process.poll() is None for process in self._processes):
            if _answers(port):
                return
            time.sleep(0.2)
        logs = [path.read_text(errors="replace")[-500:] for path in sorted(Path(self._folder.name).glob("*.log"))]
        raise BenchmarkError("NVIDIA's frontend and mocker did not start; they said:\n" + "\n".join(logs))


def _answers(port: int) -> bool:
    body = {"model": _MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
