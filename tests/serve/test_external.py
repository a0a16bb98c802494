"""A scripted server that speaks as vLLM does, behind a real uvicorn, and one of ours."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from dynamo.serve.engine.request import GenerationRequest, OutputDelta, SamplingParams
from dynamo.serve.errors import EngineOverloadedError, RequestError, RequestFailedError, WorkerLostError
from dynamo.serve.external import ExternalTimeouts, ExternalWorker

TIMEOUTS = ExternalTimeouts(connect_s=2.0, idle_s=2.0, probe_s=2.0)


@dataclass
class Foreign:
    """Says `reply`, one byte for a token, as vLLM does.

    Attributes:
        known: fields beyond OpenAI's that it takes; others are refused.
        tokens_per_chunk: how many come in one event.
        break_after: closes the connection after so many tokens; None never.
        refuse: status and error instead of an answer.
        error_after: sends this as an error event after two tokens.
        hold: never goes on after the first chunk.
        ends_itself: finish reason and stop reason of the end.
        aborted: set when a client has left in the middle.
    """

    reply: str = "Hello, world."
    known: tuple[str, ...] = ("return_token_ids", "return_tokens_as_token_ids", "cache_salt")
    tokens_per_chunk: int = 1
    break_after: int | None = None
    refuse: tuple[int, Any] | None = None
    error_after: Any = None
    hold: bool = False
    finish: tuple[str, int | str | None] = ("stop", None)
    cached_tokens: int | None = 3
    health: int = 200
    has_done: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        match scope["path"]:
            case "/health":
                await answer(send, self.health, {})
            case "/v1/models":
                await answer(send, 200, {"object": "list", "data": [{"id": "m", "max_model_len": 99, "root": "x"}]})
            case "/v1/completions":
                self.headers.append(dict(scope["headers"]))
                await self._complete(json.loads(body), receive, send)

    async def _complete(self, body: dict[str, Any], receive: Receive, send: Send) -> None:
        for name in ("return_token_ids", "return_tokens_as_token_ids"):
            if name in body and name not in self.known:
                await answer(send, 400, {"error": {"message": f"unknown {name}", "type": "BadRequest", "code": 400}})
                return
        if not body.get("stream"):
            ids = {"token_ids": [65]} if body.get("return_token_ids") else {}
            await answer(send, 200, {"choices": [{"index": 0, "text": "A", "finish_reason": "length", **ids}]})
            return
        self.bodies.append(body)
        if self.refuse is not None:
            await answer(send, *self.refuse)
            return
        leaving = asyncio.create_task(self._watch(receive))
        try:
            await self._stream(body, send)
        finally:
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.aborted.set()

    async def _stream(self, body: dict[str, Any], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        done = len(body["prompt"]) - len(PROMPT)
        ids = list(self.reply.encode())[done:][: body["max_tokens"]]
        for start in range(0, len(ids), self.tokens_per_chunk):
            if self.break_after is not None and start >= self.break_after:
                raise ConnectionResetError("the script says so")
            if self.error_after is not None and start >= 2:
                await event(send, {"error": self.error_after})
                return
            if self.hold and start:
                await self.aborted.wait()
            part = ids[start : start + self.tokens_per_chunk]
            choice: dict[str, Any] = {"index": 0, "text": bytes(part).decode(errors="replace"), "finish_reason": None}
            if body.get("return_token_ids"):
                choice["token_ids"] = part
            if body.get("logprobs") is not None:
                choice["logprobs"] = {
                    "tokens": [f"token_id:{one}" for one in part],
                    "token_logprobs": [-0.5] * len(part),
                    "top_logprobs": [{f"token_id:{one}": -0.5, "token_id:7": -0.25, "token_id:8": -9.0} for one in part],
                    "text_offset": [0] * len(part),
                }
            if start + self.tokens_per_chunk >= len(ids):
                choice["finish_reason"], choice["stop_reason"] = self.finish
            await event(send, {"id": "x", "object": "text_completion", "choices": [choice]})
        details = {"prompt_tokens_details": {"cached_tokens": self.cached_tokens}} if self.cached_tokens else {}
        await event(send, {"choices": [], "usage": {"prompt_tokens": 1, "total_tokens": 2, **details}})
        if self.has_done:
            await send({"type": "http.response.body", "body": b"data: [DONE]\r\n\r\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def answer(send: Send, status: int, body: Any) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def event(send: Send, value: Any) -> None:
    await send({"type": "http.response.body", "body": b"data: " + json.dumps(value).encode() + b"\n\n", "more_body": True})


class Quiet(uvicorn.Server):
    def install_signal_handlers(self) -> None: ...


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The app behind uvicorn on a free port of this loop."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        server = Quiet(config)
        task = asyncio.create_task(server._serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await task
