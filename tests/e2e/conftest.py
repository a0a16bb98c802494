"""What a client and an operator see of a server: completions, metrics, health, its log."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_TIMEOUT_S = 120.0


class Client:
    """Talks to a running server of the demo model."""

    def __init__(self, server: Any, eventually: Callable[[Callable[[], bool]], None]) -> None:
        self.server = server
        self._eventually = eventually

    def complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        """Greedy completion of token ids, not streamed."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **options}
        return self.post("/v1/completions", body)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A JSON request to the demo model and its JSON answer."""
        data = json.dumps({"model": "demo", **body}).encode()
        request = urllib.request.Request(self.server.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels as printed."""
        with urllib.request.urlopen(self.server.url + "/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def settle(self) -> None:
        """Waits until nothing is on its way to the lower tiers."""
        self._eventually(self._is_settled)

    def _is_settled(self) -> bool:
        metrics = self.metrics()
        return not (metrics["dynamo_kvcache_pending_offload_blocks"] or metrics["dynamo_kvcache_pending_disk_blocks"])

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.server.url + "/health", timeout=10) as response:
                return bool(response.status == 200)
        except urllib.error.URLError:
            return False

    def warnings(self, *words: str) -> list[str]:
        """Lines the server logged as warnings that have all of `words` in them."""
        return [line for line in self.server.log.splitlines() if "WARNING" in line and all(w in line for w in words)]


@pytest.fixture
def start(start_server: Callable[..., Any], eventually: Callable[..., None]) -> Callable[..., Client]:
    """Starts a server and gives a client of it."""
    return lambda *flags, **options: Client(start_server(*flags, **options), eventually)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for the disk tier that outlives a server."""
    return tmp_path / "kv"


@dataclass
class Streamed:
    """What a client of one stream has seen.

    Attributes:
        num_chunks: that carried text.
        usage: of the last chunk, without what the cache did.
        cached_tokens: what the cache did.
        error: the error event; None without one.
        is_done: [DONE] came.
    """

    text: str = ""
    num_chunks: int = 0
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    cached_tokens: int = 0
    error: dict[str, Any] | None = None
    is_done: bool = False
    worker_id: str | None = None

    @property
    def answer(self) -> tuple[str, str | None, dict[str, int] | None, bool]:
        """What must be the same whatever became of the workers."""
        return self.text, self.finish_reason, self.usage, self.is_done


class Streams:
    """Completions that are streamed side by side.

    Attributes:
        seen: one for each body, in their order, growing while they run.
    """

    def __init__(self, url: str, bodies: Sequence[dict[str, Any]]) -> None:
        self._url = url
        self._bodies = bodies
        self.seen = [Streamed() for _ in bodies]

    async def run(self, on_chunk: Callable[[int, Streamed], None] = lambda number, seen: None) -> list[Streamed]:
        """Runs them to their ends.

        Args:
            on_chunk: called with a stream's number after each of its chunks.
        """
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(self._one(session, number, on_chunk) for number in range(len(self._bodies))))
        return self.seen

    async def _one(
        self, session: aiohttp.ClientSession, number: int, on_chunk: Callable[[int, Streamed], None]
    ) -> None:
        seen = self.seen[number]
        fixed = {"model": "demo", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        body = {**fixed, "ignore_eos": True, **self._bodies[number]}
        async with session.post(f"{self._url}/v1/completions", json=body) as response:
            seen.worker_id = response.headers.get("x-dynamo-worker-id")
            if response.status != 200:
                seen.error = (await response.json())["error"]
                return
            async for line in response.content:
                if line.startswith(b"data: "):
                    _take(seen, line.removeprefix(b"data: ").strip())
                    on_chunk(number, seen)


def _take(seen: Streamed, data: bytes) -> None:
    if data == b"[DONE]":
        seen.is_done = True
        return
    chunk = json.loads(data)
    if "error" in chunk:
        seen.error = chunk["error"]
        return
    for choice in chunk["choices"]:
        seen.text += choice["text"]
        seen.num_chunks += bool(choice["text"])
        seen.finish_reason = choice["finish_reason"] or seen.finish_reason
    if (usage := chunk.get("usage")) is not None:
        seen.cached_tokens = (usage.pop("prompt_tokens_details", None) or {}).get("cached_tokens", 0)
        seen.usage = usage


@pytest.fixture
def streams() -> type[Streams]:
    """The class of streams side by side."""
    return Streams
