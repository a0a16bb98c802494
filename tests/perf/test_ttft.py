"""Time to first token, without the server that takes it."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from dynamo.perf import ttft
from dynamo.perf.__main__ import main


class _Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "m", "max_model_len": 1000}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def server_of_1000_tokens(*_: str) -> Iterator[SimpleNamespace]:
    with HTTPServer(("127.0.0.1", 0), _Models) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def test_a_prompt_beyond_the_context_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ttft, "ServerProcess", server_of_1000_tokens)
    assert main(["ttft", "--prompt-tokens", "100000000"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --prompt-tokens 100000000 does not fit into the 1000 tokens that the model and --device-cache allow, with 16 "
        "for the answer; give at most 984"
    )
