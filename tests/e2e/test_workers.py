"""Several worker processes behind fronts: real processes, real sockets, real kills."""

import asyncio
import fcntl
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dynamo.serve.model_place import find_model
from dynamo.serve.plane.questions import fetch_snapshot

pytestmark = pytest.mark.slow

logger = logging.getLogger(__name__)

MOCKER = ("--engine", "mocker", "--mocker-step-time", "0.02")
SMALL = ("--device-cache", "16MiB", "--host-cache", "8MiB", "--disk-cache", "off")
NUM_STREAMS = 32
NUM_TOKENS = 40


def bodies(salt: str, num: int = NUM_STREAMS, max_tokens: int = NUM_TOKENS) -> list[dict[str, Any]]:
    """Requests without a common prefix, always the same but for their salt, so that none finds another's blocks."""
    rng = random.Random(0)
    return [
        {"prompt": [0, *rng.choices(range(300, 2000), k=60)], "max_tokens": max_tokens, "cache_salt": salt}
        for _ in range(num)
    ]


def prompt(seed: int, length: int = 400) -> list[int]:
    return [0, *random.Random(seed).choices(range(300, 2000), k=length - 1)]


def undisturbed(server: Any, streams: Any, **options: Any) -> list[Any]:
    seen = asyncio.run(streams(server.url, bodies("undisturbed", **options)).run())
    answers = [stream.answer for stream in seen]
    assert all(is_done for _, _, _, is_done in answers)
    return answers


def fleet(start: Any, discovery: Path, *flags: str) -> Any:
    """A client of a server with workers, whose folder is known."""
    return start("--discovery", str(discovery), *SMALL, *flags)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_a_conversation_returns_to_the_worker_that_holds_it(start: Any, discovery: Path, num_workers: int) -> None:
    client = fleet(start, discovery, "--workers", str(num_workers))
    conversations: dict[int, str] = {}

    def turn(seed: int, length: int) -> tuple[str, int]:
        data = json.dumps({"model": "demo", "prompt": prompt(seed, length), "max_tokens": 8, "temperature": 0}).encode()
        request = urllib.request.Request(
            client.server.url + "/v1/completions", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            usage = json.load(response)["usage"]
            return response.headers["x-dynamo-worker-id"], usage["prompt_tokens_details"]["cached_tokens"]

    for seed in range(4 * num_workers):
        conversations[seed], cached = turn(seed, 400)
        assert cached == 0
    assert set(conversations.values()) == {f"worker-{number}" for number in range(num_workers)}
    for length in (500, 600):
        for seed, worker_id in conversations.items():
            found, cached = turn(seed, length)
            assert found == worker_id
            assert cached >= (length - 100) // 16 * 16
    assert client.server.stop() == 0
    assert "Traceback" not in client.server.log


@pytest.mark.parametrize("engine", ["mocker", "model"])
def test_no_client_notices_that_a_worker_is_killed(
    start: Any, discovery: Path, streams: Any, registration: Any, eventually: Any, engine: str
) -> None:
    """Before the first token, after it, in the middle, before the last; each killed worker comes back and serves again."""
    flags = MOCKER if engine == "mocker" else ("--engine", "model")
    client = fleet(start, discovery, "--workers", "3", *flags)
    expected = undisturbed(client.server, streams)
    num_carried_on = 0.0
    # Another worker each time, so that each is restarted after the shortest pause.
    for token, worker_id in (
        (0, "worker-1"),
        (1, "worker-2"),
        (NUM_TOKENS // 2, "worker-0"),
        (NUM_TOKENS - 1, "worker-1"),
    ):
        eventually(lambda worker_id=worker_id: serves(client, worker_id))
        killed = kill_at(client.server.url, streams, registration, eventually, worker_id, token)
        assert [stream.answer for stream in killed] == expected
        metrics = client.metrics()
        before, num_carried_on = num_carried_on, summed(metrics, "dynamo_migration_succeeded_total")
        if token < NUM_TOKENS - 1:  # else its streams may have ended before the signal was there
            assert num_carried_on > before
        assert summed(metrics, "dynamo_migration_exhausted_total") == 0
    assert "worker-1 ended with SIGKILL; restarting it" in client.server.log
    assert client.server.stop() == 0
    assert "Traceback" not in client.server.log


def summed(metrics: dict[str, float], name: str) -> float:
    return sum(value for sample, value in metrics.items() if sample.startswith(name))


def kill_at(url: str, streams: Any, registration: Any, eventually: Any, worker_id: str, token: int) -> list[Any]:
    """Streams, and kills a worker as soon as one of its streams has shown `token` tokens; for 0, as soon as it has some."""
    victim, address = registration(worker_id)
    running = streams(url, bodies(f"killed at {token}"))
    is_killed = False

    def look(number: int, seen: Any) -> None:
        nonlocal is_killed
        if not is_killed and seen.worker_id == worker_id and seen.num_chunks >= token:
            is_killed = True
            os.kill(victim, signal.SIGKILL)

    async def run() -> list[Any]:
        if token:
            return list(await running.run(look))
        task = asyncio.create_task(running.run())
        await asyncio.to_thread(eventually, lambda: num_requests(address) > 0)
        os.kill(victim, signal.SIGKILL)
        return list(await task)

    seen = asyncio.run(run())
    assert token == 0 or is_killed
    return seen


def num_requests(address: str) -> int:
    """Requests that a worker has, by its own account."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(address.removeprefix("unix:"))
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    found = re.findall(r"^dynamo_engine_(?:running|waiting)_sequences (\d+)", answer, re.MULTILINE)
    assert len(found) == 2
    return sum(map(int, found))


def test_without_migration_the_clients_of_a_killed_worker_get_an_error_and_no_end(
    start: Any, discovery: Path, streams: Any, registration: Any, eventually: Any
) -> None:
    client = fleet(start, discovery, "--workers", "3", "--migration-limit", "0", *MOCKER)
    expected = undisturbed(client.server, streams)
    seen = kill_at(client.server.url, streams, registration, eventually, "worker-1", 5)
    broken = [stream for stream in seen if stream.error is not None]
    assert 0 < len(broken) < len(seen)
    for stream in broken:
        assert not stream.is_done
        assert stream.error["code"] == "worker_lost"
    whole = [(stream.answer, answer) for stream, answer in zip(seen, expected, strict=True) if stream.error is None]
    assert all(got == wanted for got, wanted in whole)


def serves(client: Any, worker_id: str) -> bool:
    """Whether a request that asks for this worker is answered."""
    try:
        answer = client.complete(prompt(1), max_tokens=1, dynamo={"worker": worker_id})
    except urllib.error.HTTPError as error:
        error.close()
        return False
    return bool(answer["choices"])


def side_by_side(start_worker: Any, *worker_ids: str) -> list[Any]:
    """Workers, started at the same time."""
    with ThreadPoolExecutor() as starting:
        return list(starting.map(lambda worker_id: start_worker(worker_id, *MOCKER), worker_ids))


class Load:
    """Clients that send one request after the other until told to stop."""

    def __init__(self, urls: list[str], streams: Any, num_clients: int = 8) -> None:
        self._urls = urls
        self._streams = streams
        self._num_clients = num_clients
        self._is_over = False
        self._has_ended = asyncio.Event()
        self.seen: list[Any] = []

    async def __aenter__(self) -> "Load":
        self._clients = [asyncio.create_task(self._client(number)) for number in range(self._num_clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over = True
        await asyncio.gather(*self._clients)

    async def wait_for(self, num_requests: int) -> None:
        """Until so many more have ended."""
        wanted = len(self.seen) + num_requests
        async with asyncio.timeout(60):
            while len(self.seen) < wanted:
                self._has_ended.clear()
                await self._has_ended.wait()

    async def _client(self, number: int) -> None:
        rng = random.Random(number)
        url = self._urls[number % len(self._urls)]
        while not self._is_over:
            body = {"prompt": [0, *rng.choices(range(300, 2000), k=60)], "max_tokens": 8}
            self.seen += await self._streams(url, [body]).run()
            self._has_ended.set()


def test_workers_come_and_go_under_load_and_no_request_fails(
    start: Any, start_worker: Any, discovery: Path, streams: Any, eventually: Any
) -> None:
    first, second = side_by_side(start_worker, "first", "second")
    client = start("frontend", "--discovery", str(discovery), "--engine", "mocker")
    eventually(client.is_healthy)

    async def run() -> list[Any]:
        async with Load([client.server.url], streams) as load:
            await load.wait_for(20)
            third = await asyncio.to_thread(start_worker, "third", *MOCKER)
            await load.wait_for(40)
            assert await asyncio.to_thread(first.stop) == 0
            await load.wait_for(20)
            await asyncio.to_thread(second.kill)
            await load.wait_for(40)
        assert third.process.poll() is None
        return load.seen

    seen = asyncio.run(run())
    assert [stream.error for stream in seen if stream.error is not None] == []
    assert all(stream.is_done and stream.usage["completion_tokens"] == 8 for stream in seen)
    served = Counter(stream.worker_id for stream in seen)
    assert served["third"] > 0
    assert "Traceback" not in client.server.log + first.log


def indexed(client: Any, worker_id: str) -> dict[str, int]:
    """Blocks by tier that a front believes a worker to hold."""
    pattern = re.compile(rf'dynamo_worker_indexed_blocks{{(?=.*worker="{worker_id}").*tier="(\w+)".*}}')
    found = ((pattern.fullmatch(name), value) for name, value in client.metrics().items())
    return {match[1]: int(value) for match, value in found if match is not None and value}


def held(address: str, worker_id: str) -> dict[str, int]:
    """Blocks by tier that it does hold."""
    snapshot = asyncio.run(fetch_snapshot(address, worker_id))
    return {tier: len(keys) for tier, keys in snapshot.held.items() if len(keys)}


def test_what_departed_workers_held_vanishes_from_the_index(
    start: Any, start_worker: Any, discovery: Path, eventually: Any
) -> None:
    leaving, crashing = side_by_side(start_worker, "leaving", "crashing")
    client = start("frontend", "--discovery", str(discovery), "--engine", "mocker")
    eventually(lambda: client.metrics().get('dynamo_worker_ready{worker="crashing"}') == 1)
    eventually(lambda: client.metrics().get('dynamo_worker_ready{worker="leaving"}') == 1)
    for worker in (leaving, crashing):
        client.complete(prompt(1), dynamo={"worker": worker.worker_id})
        eventually(lambda worker=worker: indexed(client, worker.worker_id).get("device", 0) >= 25)
    leaving.process.send_signal(signal.SIGTERM)
    logger.info("leave_s: %.2f", seconds_until(lambda: not indexed(client, "leaving"), eventually, at_most_s=1.0))
    crashing.kill()
    logger.info("crash_s: %.2f", seconds_until(lambda: not indexed(client, "crashing"), eventually, at_most_s=3.0))
    assert not client.is_healthy()


def seconds_until(condition: Any, eventually: Any, *, at_most_s: float) -> float:
    started = time.monotonic()
    eventually(condition)
    seconds = time.monotonic() - started
    assert seconds < at_most_s
    return seconds


def test_fronts_know_the_truth_and_each_others_load_after_any_restart(
    start: Any,
    start_worker: Any,
    discovery: Path,
    registration: Any,
    streams: Any,
    eventually: Any,
) -> None:
    worker = start_worker("w", *MOCKER)

    def agrees(client: Any) -> bool:
        return bool(indexed(client, "w") == held(registration("w")[1], "w"))

    def front() -> Any:
        client = start("frontend", "--discovery", str(discovery), "--engine", "mocker")
        eventually(client.is_healthy)
        return client

    first, second = front(), front()
    for seed in range(4):
        first.complete(prompt(seed))
    assert held(registration("w")[1], "w")["device"] >= 100
    for client in (first, second):
        logger.info("follows_s: %.2f", seconds_until(lambda client=client: agrees(client), eventually, at_most_s=3.0))
    asyncio.run(kill_in_sight(first, second, streams, eventually))
    third = front()
    logger.info("front_restart_s: %.2f", seconds_until(lambda: agrees(third), eventually, at_most_s=3.0))
    worker.kill()
    start_worker("w", *MOCKER)
    for client in (second, third):
        eventually(client.is_healthy)
        client.complete(prompt(9))
        logger.info(
            "worker_restart_s: %.2f", seconds_until(lambda client=client: agrees(client), eventually, at_most_s=3.0)
        )
        assert indexed(client, "w")["device"] < 100


async def kill_in_sight(first: Any, second: Any, streams: Any, eventually: Any) -> None:
    """Kills a front with requests under way; the other one sees them come, and go with it."""
    foreign = 'dynamo_worker_foreign_requests{worker="w"}'
    task = asyncio.create_task(streams(first.server.url, bodies("seen by both", 4, max_tokens=1000)).run())
    await asyncio.to_thread(eventually, lambda: second.metrics()[foreign] == 4)
    assert first.metrics()[foreign] == 0
    first.server.kill()
    await asyncio.to_thread(eventually, lambda: second.metrics()[foreign] == 0)
    await asyncio.gather(task, return_exceptions=True)


def test_a_server_of_another_make_is_served_through_the_same_front(start: Any, streams: Any, eventually: Any) -> None:
    plain = start()
    client = start("frontend", "--external", plain.server.url)
    eventually(client.is_healthy)
    expected = undisturbed(plain.server, streams, num=4)
    assert undisturbed(client.server, streams, num=4) == expected


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files. Not `tmp_path`: sockets lie in it, whose paths have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dynamo-") as folder:
        yield Path(folder)


def test_a_stopped_server_lets_its_streams_come_to_their_end_and_leaves_nothing(
    start: Any, streams: Any, temporary: Path
) -> None:
    client = start("--workers", "2", *SMALL, *MOCKER, environment={"TMPDIR": str(temporary)})
    children = children_of(client.server.process.pid)
    assert len(children) == 2
    (settings,) = temporary.rglob("workers.toml")
    locked = os.open(settings.parent, os.O_RDONLY)
    with pytest.raises(BlockingIOError):  # so that it is not tidied up while the server runs
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(locked)
    running = streams(client.server.url, bodies("stopped", 4))

    def look(number: int, seen: Any) -> None:
        # A second signal would force the end: only the first chunk of one stream sends it.
        if number == 0 and seen.num_chunks == 1:
            client.server.process.send_signal(signal.SIGTERM)

    seen = asyncio.run(running.run(look))
    assert all(stream.is_done and stream.usage["completion_tokens"] == NUM_TOKENS for stream in seen)
    assert client.server.process.wait(30) == 0
    assert list(temporary.iterdir()) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert "Traceback" not in client.server.log


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_workers_end_with_a_server_that_is_killed(start: Any, eventually: Any) -> None:
    client = start("--workers", "2", *SMALL, *MOCKER)
    children = children_of(client.server.process.pid)
    client.server.kill()
    eventually(lambda: not any(is_running(pid) for pid in children))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_weights_that_are_missing_end_the_server_with_the_workers_own_sentence(
    tmp_path: Path, demo_without_weights: Path
) -> None:
    command = [sys.executable, "-P", "-m", "dynamo.serve", str(demo_without_weights), "--port", "0", "--workers", "2"]
    done = subprocess.run([*command, *SMALL], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "neither model.safetensors nor" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: worker-")
    assert "Traceback" not in done.stderr


@pytest.fixture
def demo_without_weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(find_model("demo")[0], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_second_server_does_not_take_anothers_workers_for_its_own(start: Any, discovery: Path) -> None:
    client = fleet(start, discovery, "--workers", "1", *MOCKER)
    command = (sys.executable, "-P", "-m", "dynamo.serve", "--workers", "1", "--discovery", str(discovery), *MOCKER)
    second = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=60, cwd=discovery, check=False
    )
    assert second.returncode == 2
    assert "listening" not in second.stdout
    assert "a worker of that name runs already" in second.stderr
    assert client.server.stop() == 0
