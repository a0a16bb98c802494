"""Worker processes are kept running, shown, given up and ended; here they are small scripts."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from dynamo.serve.errors import WorkerStartError
from dynamo.serve.supervisor import Supervisor, WorkerCommand

_TIMEOUT_S = 30.0

# Says where it is, then waits; ends in peace on SIGTERM.
WAITS = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("pid", os.getpid(), flush=True)
signal.pause()
"""


def command(worker_id: str, code: str) -> WorkerCommand:
    return WorkerCommand(worker_id, (sys.executable, "-S", "-c", code), dict(os.environ))


class Output:
    """What the supervisor wrote, and a way to wait for some of it."""

    def __init__(self) -> None:
        self.text = ""
        self._grown = asyncio.Event()

    def write(self, text: str) -> None:
        self.text += text
        self._grown.set()

    async def has(self, condition: Callable[[str], bool]) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            while not condition(self.text):
                self._grown.clear()
                await self._grown.wait()

    def pids(self) -> list[int]:
        return [int(line.rpartition(" ")[2]) for line in self.text.splitlines() if " | pid " in line]


def supervised(
    commands: list[WorkerCommand],
    body: Callable[[Supervisor, Output], Awaitable[None]],
    *,
    backoff_s: float = 0.01,
) -> None:
    async def run() -> None:
        output = Output()
        supervisor = Supervisor(commands, write=output.write, backoff_s=backoff_s)
        await supervisor.start()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await body(supervisor, output)
        finally:
            await supervisor.stop(5.0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_is_shown_line_by_line_with_the_workers_name() -> None:
    async def body(supervisor: Supervisor, output: Output) -> None:
        await output.has(lambda text: text.count("\n") >= 3)
        assert sorted(output.text.splitlines())[:2] == ["a | on stderr", "a | on stdout"]

    code = 'import sys; print("on stdout", flush=True); print("on stderr", file=sys.stderr)' + WAITS
    supervised([command("a", code)], body)


def test_what_a_worker_reads_while_it_starts_is_there_again_for_its_next_start(tmp_path: Path) -> None:
    path = tmp_path / "own" / "settings"
    code = f"import os; print(open({str(path)!r}).read(), flush=True); os.remove({str(path)!r}); os.rmdir({str(path.parent)!r})"

    async def body(supervisor: Supervisor, output: Output) -> None:
        await output.has(lambda text: text.count("a | wanted") >= 3)

    supervised([replace(command("a", code), files={path: "wanted"})], body)


def test_endless_lines_are_cut_instead_of_kept() -> None:
    async def body(supervisor: Supervisor, output: Output) -> None:
        await output.has(lambda text: "the end" in text)
        assert max(map(len, output.text.splitlines())) < 200_000

    supervised([command("a", 'import sys; sys.stdout.write("x" * 1_000_000 + "\\nthe end\\n")' + WAITS)], body)


def test_a_worker_that_dies_is_started_again_and_counted() -> None:
    async def body(supervisor: Supervisor, output: Output) -> None:
        await output.has(lambda text: len(output.pids()) == 2)
        supervisor.establish()
        first, other = output.pids()
        os.kill(first, signal.SIGKILL)
        await output.has(lambda text: len(output.pids()) == 3)
        assert is_running(other)
        (family,) = supervisor.collect()
        assert sorted(sample.value for sample in family.samples) == [0, 1]

    supervised([command("a", WAITS), command("b", WAITS)], body)


def test_a_wrong_setting_ends_the_server_with_the_workers_own_sentence() -> None:
    async def body(supervisor: Supervisor, output: Output) -> None:
        failure = await supervisor.failed()
        assert isinstance(failure, WorkerStartError)
        assert str(failure) == "a: there is no such model"
        assert output.text.count("no such model") == 1

    supervised([command("a", 'import sys; print("error: there is no such model"); sys.exit(2)')], body)


def test_a_worker_that_dies_again_and_again_is_given_up() -> None:
    async def body(supervisor: Supervisor, output: Output) -> None:
        failure = await supervisor.failed()
        assert str(failure) == "a ended 5 times in a row, last with exit code 1: cannot go on"
        assert output.text.count("cannot go on") == 5

    supervised([command("a", 'import sys; print("cannot go on"); sys.exit(1)'), command("b", WAITS)], body)


def test_once_the_server_is_ready_one_bad_worker_does_not_end_it(tmp_path: Path, caplog: Any) -> None:
    # Starts once; after that it is broken.
    code = f"""
import pathlib, sys
mark = pathlib.Path({str(tmp_path / "mark")!r})
if mark.exists():
    print("broken now", flush=True)
    sys.exit(2)
mark.touch()
{WAITS}"""

    async def body(supervisor: Supervisor, output: Output) -> None:
        await output.has(lambda text: len(output.pids()) == 2)
        supervisor.establish()
        (broken,) = [int(line.split()[-1]) for line in output.text.splitlines() if line.startswith("a | pid")]
        os.kill(broken, signal.SIGKILL)
        await output.has(lambda text: text.count("broken now") == 6)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(supervisor.failed(), 0.2)
        assert "a ended 5 times in a row, last with exit code 2: broken now; the others go on" in caplog.text
        (tmp_path / "mark").unlink()  # what it lacked is there again
        await output.has(lambda text: len(output.pids()) == 3)

    supervised([command("a", code), command("b", WAITS)], body)


def test_only_its_own_processes_make_a_worker_ready() -> None:
    """Another server on the same folder has workers of the same names."""

    async def body(supervisor: Supervisor, output: Output) -> None:
        await output.has(lambda text: len(output.pids()) == 1)
        supervisor.mark_ready("a", os.getpid())
        supervisor.mark_ready("b", output.pids()[0])
        assert not supervisor.are_all_ready
        supervisor.mark_ready("a", output.pids()[0])
        assert supervisor.are_all_ready

    supervised([command("a", WAITS)], body)


def test_a_worker_that_cannot_be_started_now_is_tried_again(caplog: Any) -> None:
    async def body(supervisor: Supervisor, output: Output) -> None:
        await output.has(lambda text: len(output.pids()) == 1)
        supervisor.establish()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # as where clients have taken all descriptors
        try:
            os.kill(output.pids()[0], signal.SIGKILL)
            while "restarting it in" not in caplog.text or "exit code 126" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await output.has(lambda text: len(output.pids()) == 2)

    supervised([command("a", WAITS)], body, backoff_s=0.1)


def test_when_no_worker_can_be_kept_the_server_ends() -> None:
    async def body(supervisor: Supervisor, output: Output) -> None:
        supervisor.establish()
        failure = await supervisor.failed()
        assert "times in a row, last with exit code 1: cannot go on" in str(failure)

    broken = 'import sys; print("cannot go on"); sys.exit(1)'
    supervised([command("a", broken), command("b", broken)], body)


def test_stop_ends_all_even_those_that_do_not_listen() -> None:
    deaf = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("pid", os.getpid(), flush=True)
while True:
    signal.pause()
"""
    pids = []

    async def body(supervisor: Supervisor, output: Output) -> None:
        await output.has(lambda text: len(output.pids()) == 2)
        pids.extend(output.pids())
        await supervisor.stop(0.3)

    async def run() -> None:
        output = Output()
        supervisor = Supervisor([command("a", WAITS), command("b", deaf)], write=output.write, flush_timeout_s=0)
        await supervisor.start()
        await body(supervisor, output)

    asyncio.run(run())
    assert not any(map(is_running, pids))


def test_workers_end_when_their_supervisor_is_killed(eventually: Any) -> None:
    worker = f"""
from dynamo.serve.lifeline import hold_on
hold_on(5.0)
{WAITS}"""
    parent = f"""
import asyncio, os, sys
from dynamo.serve.supervisor import Supervisor, WorkerCommand
async def run():
    command = WorkerCommand("a", (sys.executable, "-P", "-c", {worker!r}), dict(os.environ))
    supervisor = Supervisor([command], write=lambda text: print(text, end="", flush=True))
    await supervisor.start()
    await asyncio.sleep({_TIMEOUT_S})
asyncio.run(run())
"""
    process = subprocess.Popen([sys.executable, "-P", "-c", parent], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        pid = int(line.rpartition(" ")[2])
        assert is_running(pid)
        process.kill()
        process.wait(_TIMEOUT_S)
        started = time.monotonic()
        eventually(lambda: not is_running(pid))
        assert time.monotonic() - started < 5
