"""What a client and an operator see of a server: completions, metrics, health, its log."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
        return self._post(path, {"model": "demo", **body})

    def administer(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        """An operation on the cache and its JSON answer; the server must have been started with --admin."""
        return self._post(f"/admin/cache/{operation}", body)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
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
