"""Keeps worker processes running: starts them, shows what they say, restarts those that die, ends all of them in order.

starting ──ready──► running ──dies──► backoff: 0.5, 1, 2, … s ──► starting
    └─dies, five times in a row─► ends the server if it was never ready, or if all others are in the same state;
                                  else tried again every 30 s: what it lacks may be there again
"""

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo.serve.errors import WorkerStartError
from dynamo.serve.lifeline import LIFELINE_VARIABLE, Lifeline
from dynamo.serve.registration_files import make_private

__all__ = ["Supervisor", "WorkerCommand"]

logger = logging.getLogger(__name__)

_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
_MAX_DEATHS = 5
_STEADY_S = 10.0  # a worker that was ready for so long begins anew with the shortest pause
_FLUSH_TIMEOUT_S = 20.0
_KILL_TIMEOUT_S = 10.0
_MAX_LINE_BYTES = 1 << 16
_EXIT_USAGE = 2
_EXIT_NOT_STARTED = 126  # as shells say it


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """How one worker is started.

    Attributes:
        arguments: the program and its arguments.
        environment: of the process.
        files: what it reads while it starts, in a folder of this process's own.
    """

    worker_id: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    files: Mapping[Path, str] = field(default_factory=dict)

    def write_files(self) -> None:
        """Writes those files that are not there: after weeks somebody may have tidied them up.

        Raises:
            OSError: they cannot be written.
        """
        for path, text in self.files.items():
            if not path.exists():
                make_private(path.parent)
                path.write_text(text, encoding="utf-8")


@dataclass(slots=True)
class _Kept:
    """A worker's books."""

    command: WorkerCommand
    process: asyncio.subprocess.Process | None = None
    ready_since_s: float | None = None
    num_deaths: int = 0  # in a row
    num_restarts: int = 0
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=20))


class Supervisor(Collector):
    """Owns the processes of some workers from `start` to `stop`. Used on one event loop; also counts restarts for /metrics.

    Args:
        write: takes a line of a worker's output, with the worker's name before it.
        backoff_s: pause before the first restart.
        flush_timeout_s: what workers get beyond the drain, for the cache's way to disk.
    """

    def __init__(
        self,
        commands: Sequence[WorkerCommand],
        *,
        write: Callable[[str], object] = sys.stderr.write,
        backoff_s: float = _BACKOFF_S,
        flush_timeout_s: float = _FLUSH_TIMEOUT_S,
    ) -> None:
        self._workers = {command.worker_id: _Kept(command) for command in commands}
        self._write = write
        self._backoff_s = backoff_s
        self._flush_timeout_s = flush_timeout_s
        self._lifeline = Lifeline()
        self._keepers: list[asyncio.Task[None]] = []
        self._is_established = False

    async def start(self) -> None:
        """Starts all workers. Once only; `stop` ends what this begins."""
        self._stopping = asyncio.Event()
        self._failure: asyncio.Future[WorkerStartError] = asyncio.get_running_loop().create_future()
        self._keepers = [
            asyncio.create_task(self._keep(kept), name=f"keeper of {worker_id}")
            for worker_id, kept in self._workers.items()
        ]

    def mark_ready(self, worker_id: str, pid: int) -> None:
        """A worker takes requests. Other names, and other processes of the same name, are another server's."""
        kept = self._workers.get(worker_id)
        if kept is not None and kept.ready_since_s is None and kept.process is not None and kept.process.pid == pid:
            kept.ready_since_s = time.monotonic()

    @property
    def are_all_ready(self) -> bool:
        """Whether each worker takes requests, as far as was told."""
        return all(kept.ready_since_s is not None for kept in self._workers.values())

    def establish(self) -> None:
        """The server as a whole is ready: from now on a worker that cannot be kept does not end it while there are others."""
        self._is_established = True

    async def failed(self) -> WorkerStartError:
        """Waits until there is no sense in going on, and says why. May wait for ever: to be cancelled by who waits."""
        return await asyncio.shield(self._failure)

    async def stop(self, drain_timeout_s: float) -> None:
        """Ends all workers: SIGTERM, and SIGKILL for those that take longer than to drain and to write the cache's rest."""
        self._stopping.set()
        self.signal(signal.SIGTERM)
        try:
            await self._wait_all(drain_timeout_s + self._flush_timeout_s)
        finally:
            self.signal(signal.SIGKILL)
            await self._wait_all(_KILL_TIMEOUT_S)
            for keeper in self._keepers:
                keeper.cancel()
            await asyncio.gather(*self._keepers, return_exceptions=True)
            self._lifeline.close()

    def signal(self, number: int) -> None:
        """Sends a signal to all workers that run."""
        for worker_id, kept in self._workers.items():
            if kept.process is not None and kept.process.returncode is None:
                if number == signal.SIGKILL:
                    logger.warning("%s does not end: killing it", worker_id)
                with contextlib.suppress(ProcessLookupError):
                    kept.process.send_signal(number)

    def collect(self) -> Iterator[Metric]:
        """Restarts by worker."""
        restarts = CounterMetricFamily(
            "dynamo_worker_restarts", "Restarts of workers that had ended by themselves.", labels=["worker"]
        )
        for worker_id, kept in self._workers.items():
            restarts.add_metric([worker_id], kept.num_restarts)
        yield restarts

    async def _wait_all(self, timeout_s: float) -> None:
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=timeout_s)

    async def _keep(self, kept: _Kept) -> None:
        worker_id = kept.command.worker_id
        try:
            while not self._stopping.is_set():
                try:
                    code = await self._run(kept)
                except OSError as error:  # no memory or descriptors for a process now; its next start may find some
                    kept.last_lines.append(f"it cannot be started: {error}")
                    code = _EXIT_NOT_STARTED
                if self._stopping.is_set():
                    return
                pause_s = self._bury(kept, code)
                if pause_s is None:
                    return
                level = logging.INFO if code == 0 else logging.ERROR
                logger.log(level, "%s ended with %s; restarting it in %g s", worker_id, _describe(code), pause_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._stopping.wait()
                kept.num_restarts += 1
        except Exception as error:  # the root of a task: no worker is kept any more, and the server must not look well
            logger.exception("%s can no longer be supervised", worker_id)
            self._fail(WorkerStartError(f"{worker_id} can no longer be supervised: {error}"))

    async def _run(self, kept: _Kept) -> int:
        """Runs the process once, to its end; its exit code."""
        kept.ready_since_s = None
        kept.last_lines.clear()
        kept.command.write_files()
        fd = self._lifeline.child_fd
        process = await asyncio.create_subprocess_exec(
            *kept.command.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**kept.command.environment, LIFELINE_VARIABLE: str(fd)},
            pass_fds=(fd,),
            start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to pass on
        )
        kept.process = process
        if self._stopping.is_set():  # it was not there yet when the others were told
            process.terminate()
        try:
            assert process.stdout is not None
            await self._relay(process.stdout, kept)
            return await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def _relay(self, stream: asyncio.StreamReader, kept: _Kept) -> None:
        rest = b""
        while chunk := await stream.read(_MAX_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= _MAX_LINE_BYTES:
                lines.append(rest)
                rest = b""
            self._show(lines, kept)
        if rest:
            self._show([rest], kept)

    def _show(self, lines: Sequence[bytes], kept: _Kept) -> None:
        texts = [line.decode(errors="replace") for line in lines]
        kept.last_lines.extend(texts)
        if texts:
            self._write("".join(f"{kept.command.worker_id} | {text}\n" for text in texts))

    def _bury(self, kept: _Kept, code: int) -> float | None:
        """Decides what follows a death: the pause before the next start, or None for none."""
        now_s = time.monotonic()
        was_ready = kept.ready_since_s is not None
        if kept.ready_since_s is not None and (code == 0 or now_s - kept.ready_since_s >= _STEADY_S):
            kept.num_deaths = 0  # it was well, or somebody asked it to leave
        kept.num_deaths += 1
        kept.ready_since_s = None
        worker_id = kept.command.worker_id
        last = kept.last_lines[-1] if kept.last_lines else "it said nothing"
        if code == _EXIT_USAGE and not was_ready and not self._is_established:
            # It says itself what is wrong, and another try would say the same.
            self._fail(WorkerStartError(f"{worker_id}: {last.removeprefix('error: ')}", code))
            return None
        if kept.num_deaths >= _MAX_DEATHS:
            sentence = f"{worker_id} ended {kept.num_deaths} times in a row, last with {_describe(code)}: {last}"
            if not self._is_established or all(map(_cannot_be_kept, self._workers.values())):
                logger.error("%s; giving it up", sentence)
                self._fail(WorkerStartError(sentence))
                return None
            if kept.num_deaths == _MAX_DEATHS:
                logger.error("%s; the others go on, and it is tried again ever more seldom", sentence)
        return float(min(self._backoff_s * 2 ** min(kept.num_deaths - 1, 16), _MAX_BACKOFF_S))

    def _fail(self, error: WorkerStartError) -> None:
        if not self._failure.done():
            self._failure.set_result(error)


def _cannot_be_kept(kept: _Kept) -> bool:
    return kept.ready_since_s is None and kept.num_deaths >= _MAX_DEATHS


def _describe(code: int) -> str:
    """An exit code for people."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
