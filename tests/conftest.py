"""The real server, with the demo model, as a process of its own; worker processes; and the one way to wait for something."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So do shells without job control start commands in the background; here, interrupts are tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2  # linux/prctl.h, linux/capability.h
_TIMEOUT_S = 60.0
_POLL_TIMEOUT_S = 60.0
_WORKER_TIERS = ("--threads", "1", "--device-cache", "16MiB", "--host-cache", "8MiB", "--disk-cache", "off")
_SMALL_TIERS = ("--threads", "1", "--device-cache", "32MiB", "--host-cache", "32MiB")


class ServerProcess:
    """`python -m dynamo.serve` on a free port; ready when made.

    Attributes:
        banner: what it printed to stdout.
        url: where it listens.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        file_size_limit: int | None = None,
        obeys_permissions: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Starts it with small tiers, the disk tier in `folder`, unless `flags` say otherwise; or a front alone, without tiers.

        Args:
            flags: the first may be "frontend".
            file_size_limit: the largest file it may write, in bytes: a full disk that needs no disk.
            obeys_permissions: permissions of files hold for it even if it is root's.
        """
        prctl = ctypes.CDLL(None, use_errno=True).prctl

        def limit() -> None:
            if obeys_permissions and os.geteuid() == 0:
                for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
                    prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
            if file_size_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))

        self._log_path = folder / "log"
        own = ("--port", "0")
        if flags[:1] == ("frontend",):
            flags, own = flags[1:], ("frontend", *own)
        else:
            own = (*own, *_SMALL_TIERS, "--disk-cache", f"{folder / 'kv'}:64MiB")
        command = [sys.executable, "-P", "-m", "dynamo.serve", *own, *flags]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                preexec_fn=limit,
            )
        watchdog = threading.Timer(_TIMEOUT_S, self.process.kill)
        watchdog.start()
        self.banner = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.banner += line
            if "curl" in line:
                break
        watchdog.cancel()
        if "curl" not in self.banner:
            self.stop()
            pytest.fail(f"the server did not start: {self.log}")
        self.url = self.banner.partition("listening")[2].split()[0]

    @property
    def log(self) -> str:
        """What it wrote to stderr."""
        return self._log_path.read_text()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(_TIMEOUT_S)

    def stop(self) -> int:
        """Stops it like a supervisor would; its exit code. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_TIMEOUT_S)
        finally:
            self.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server shared by all tests of a worker."""
    server = ServerProcess(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of a test's own: `start_server("--engine", "mocker")`."""
    servers: list[ServerProcess] = []

    def start(
        *flags: str,
        file_size_limit: int | None = None,
        obeys_permissions: bool = False,
        environment: dict[str, str] | None = None,
    ) -> ServerProcess:
        folder = tmp_path / f"server{len(servers)}"
        folder.mkdir()
        servers.append(
            ServerProcess(
                folder,
                *flags,
                file_size_limit=file_size_limit,
                obeys_permissions=obeys_permissions,
                environment=environment,
            )
        )
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Polls a condition that no event tells of until it holds; fails after a minute. Blocks: in a coroutine, use
    `await asyncio.to_thread(eventually, condition)`."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _POLL_TIMEOUT_S
        pause, pause_s = threading.Event(), 0.002
        while not condition():
            assert time.monotonic() < deadline, f"the condition did not come true within {_POLL_TIMEOUT_S:g} s"
            pause.wait(pause_s)
            pause_s = min(1.2 * pause_s, 0.05)  # asking a server often would keep it from what is waited for

    return wait


class WorkerProcess:
    """`python -m dynamo.serve worker` in a discovery folder."""

    def __init__(self, log: Path, discovery: Path, worker_id: str, *flags: str) -> None:
        self.worker_id = worker_id
        self._log = log
        self._file = discovery / f"{worker_id}.json"
        own = ("--discovery", str(discovery), "--worker-id", worker_id, *_WORKER_TIERS)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dynamo.serve", "worker", *own, *flags], stdout=output, stderr=output
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def is_registered(self) -> bool:
        """Whether fronts can find it; fails when it has ended instead."""
        assert self.process.poll() is None, self.log
        return self._file.exists()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(_TIMEOUT_S)

    def stop(self) -> int:
        """SIGTERM; its exit code. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_TIMEOUT_S)
        finally:
            self.kill()


@pytest.fixture
def discovery(tmp_path: Path) -> Path:
    """A folder where workers register."""
    return tmp_path / "d"


@pytest.fixture
def start_worker(
    tmp_path: Path, discovery: Path, eventually: Callable[..., None]
) -> Iterator[Callable[..., WorkerProcess]]:
    """Starts workers: `start_worker("a", "--engine", "mocker")` returns when fronts can find it."""
    workers: list[WorkerProcess] = []

    def start(worker_id: str, *flags: str) -> WorkerProcess:
        worker = WorkerProcess(tmp_path / f"{worker_id}-{len(workers)}.log", discovery, worker_id, *flags)
        workers.append(worker)
        eventually(worker.is_registered)
        return worker

    yield start
    for worker in workers:
        worker.stop()


@pytest.fixture
def registration(discovery: Path) -> Callable[[str], tuple[int, str]]:
    """The process of a worker and its address, by its name, as it is registered now."""

    def find(worker_id: str) -> tuple[int, str]:
        entry = json.loads((discovery / f"{worker_id}.json").read_text())["registration"]
        os.kill(entry["pid"], 0)
        return entry["pid"], entry["address"]

    return find
