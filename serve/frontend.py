"""The ASGI application: routes, the key at the door, and every error in OpenAI's envelope.

Starlette's router finds the endpoint; the endpoints speak ASGI themselves, so nothing stands between a streamed chunk and
the server's socket.
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from dynamo.serve.admin import ADMIN_PREFIX, MAX_ADMIN_BODY_BYTES, OPERATIONS, CacheAdmin, Operation, check_local
from dynamo.serve.chat import plan_chat
from dynamo.serve.completions import plan_completion
from dynamo.serve.docs_page import DOCS_HEADERS, DOCS_HTML
from dynamo.serve.engine.request import Engine
from dynamo.serve.envelope import envelope, refusal_of, shutting_down, unforeseen
from dynamo.serve.errors import RequestError
from dynamo.serve.exchange import Exchange, read_json_body, send_body
from dynamo.serve.explain import EXPLAIN_PATH, Routed, explain, is_chat
from dynamo.serve.health import Health, Readiness
from dynamo.serve.interruption import ClientDisconnectedError, Interruption, run_interruptible
from dynamo.serve.metrics import EngineCollector, ServerMetrics
from dynamo.serve.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DynamoFields,
    ModelCard,
    ModelList,
    SamplingFields,
)
from dynamo.serve.openapi import openapi_document
from dynamo.serve.outlet import Outlet, WriteRound
from dynamo.serve.reply import Reply, ReplyPlan
from dynamo.serve.routing_hints import no_such_worker, read_fields, routing_hints
from dynamo.serve.served_model import ServedModel
from dynamo.serve.validation import RequestDecoder
from dynamo.serve.worker_metrics import METRICS_OF_WORKERS_PATH, merge_metrics

__all__ = ["MAX_BODY_BYTES", "Frontend"]

MAX_BODY_BYTES = 32 << 20
_RETRY_AFTER = (b"retry-after", b"1")
_CLIENT_LEFT_STATUS = "499"

logger = logging.getLogger(__name__)

Handler = Callable[[Exchange, Scope, Receive, Send], Awaitable[None]]


class _Endpoint:
    """A handler as an ASGI application that knows its route's name."""

    def __init__(self, path: str, handler: Handler) -> None:
        self._path = path
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["dynamo.exchange"]
        exchange.endpoint = self._path
        await self._handler(exchange, scope, receive, send)


class Frontend:
    """Serves one model's endpoints over one engine. Everything happens on the event loop that runs it.

    Args:
        api_key: asked of every request to /v1, /router and /admin; None lets everybody in, to /admin only this machine.
        collectors: more metrics for /metrics, such as the cache's.
        admin: what is behind /admin; None: there is no such thing.
        routed: the same engine, if it has workers behind it.
        stream_interval_s: a stream whose tokens come faster than this gets those of so many seconds in one write.
        max_body_bytes: longer bodies are refused with 413.

    Attributes:
        health: what /health says.
        routes: all there is, the API's endpoints and the pages about them.
    """

    def __init__(
        self,
        engine: Engine,
        served: ServedModel,
        *,
        api_key: str | None = None,
        collectors: Sequence[Collector] = (),
        admin: CacheAdmin | None = None,
        routed: Routed | None = None,
        stream_interval_s: float = 0.0,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._engine = engine
        self._served = served
        self._api_key = None if api_key is None else api_key.encode()
        self._admin = admin
        self._routed = routed
        self._stream_interval_s = stream_interval_s
        self._max_body_bytes = max_body_bytes
        self.health = Health(engine, routed)
        self._metrics = ServerMetrics()
        self._registry = CollectorRegistry(auto_describe=False)
        for collector in (self._metrics, EngineCollector(engine), *collectors):
            self._registry.register(collector)
        self._interruption = Interruption()
        self._write_round = WriteRound()
        self._arriving = Interruption()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_generating = 0
        self._chat_decoder = RequestDecoder(ChatCompletionRequest)
        self._completion_decoder = RequestDecoder(CompletionRequest)
        self._openapi = msgspec.json.encode(openapi_document(admin=admin is not None, routed=routed is not None))
        self.routes: Final = tuple(self._routes())
        self._router = Router(self.routes, redirect_slashes=False)

    def begin_drain(self) -> None:
        """From now on new requests are refused, and those whose body is still on its way; running ones go on."""
        self.health.begin_drain()
        self._arriving.trigger(shutting_down())

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no generating request is left; False when the time was not enough."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort_requests(self) -> None:
        """Ends all generating requests with an error that says the server goes away."""
        self._interruption.trigger(shutting_down())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")
        exchange = Exchange(scope, receive)
        hangs_up = False
        # Starlette's router raises for unknown paths and methods only when it finds an app to catch that.
        scope = {**scope, "app": self, "dynamo.exchange": exchange}
        try:
            if scope["path"].startswith(("/v1/", "/router/")) or scope["path"] in ("/v1", "/router"):
                self._authorize(exchange)
            elif scope["path"].startswith(ADMIN_PREFIX):
                self._authorize(exchange)
                if self._admin is None:
                    raise _no_administration(scope["path"], is_front=self._routed is not None)
                if self._api_key is None:
                    check_local(scope, exchange.headers.get("host", ""))
            await self._router(scope, exchange.receive, send)
        except ClientDisconnectedError:
            self._metrics.disconnects += 1
            self._metrics.requests[exchange.endpoint, _CLIENT_LEFT_STATUS] += 1
            return
        except Exception as error:  # the root of a request: foreseen ones are answered, others logged
            refusal = refusal_of(error, method=scope["method"], path=scope["path"])
            if refusal is None:
                logger.exception("request %s to %s failed", exchange.request_id, exchange.endpoint)
                refusal = unforeseen()
            if not exchange.response_started:
                # The rest of the body may still be on its way, and nobody will read it.
                hangs_up = refusal.status in (408, 413) or refusal.code == "shutting_down"
                await _refuse(send, exchange, refusal, getattr(error, "headers", None), hangs_up)
        if exchange.stream_error is not None:
            self._metrics.stream_errors[exchange.stream_error] += 1
        self._metrics.requests[exchange.endpoint, str(exchange.status)] += 1
        if hangs_up:
            await exchange.hang_up(send)

    def _routes(self) -> list[Route]:
        table: list[tuple[str, str, Handler]] = [
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._completions),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{model:path}", self._model),
            ("GET", "/health", self._health),
            ("GET", "/live", self._live),
            ("GET", "/metrics", self._scrape),
            ("GET", "/openapi.json", self._openapi_json),
            ("GET", "/docs", self._docs),
            ("GET", "/", self._root),
        ]
        if self._routed is not None:
            table.append(("POST", EXPLAIN_PATH, self._explaining(self._routed)))
            table.append(("GET", METRICS_OF_WORKERS_PATH, self._scraping(self._routed)))
        if self._admin is not None:
            table += [(op.method, op.path, self._administer(self._admin, op)) for op in OPERATIONS]
        return [Route(path, _Endpoint(path, handler), methods=[method]) for method, path, handler in table]

    def _authorize(self, exchange: Exchange) -> None:
        if self._api_key is None:
            return
        scheme, _, key = exchange.headers.get("authorization", "").partition(" ")
        # Compared as the bytes that came, which Starlette reads as Latin-1: compare_digest takes no text beyond ASCII.
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self._api_key):
            # Clients recognise this error by the words OpenAI uses for it.
            message = "Incorrect API key provided, or none; send it in the header 'Authorization: Bearer KEY'"
            raise RequestError(message, status=401, code="invalid_api_key")

    async def _chat(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(exchange, receive, send, self._chat_decoder, plan_chat)

    async def _completions(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(exchange, receive, send, self._completion_decoder, plan_completion)

    async def _generate(
        self,
        exchange: Exchange,
        receive: Receive,
        send: Send,
        decoder: RequestDecoder[Any],
        plan_request: Callable[[Any, ServedModel], Awaitable[ReplyPlan]],
    ) -> None:
        self.health.check_accepting()
        body = await self._arriving.guard(read_json_body(exchange, receive, self._max_body_bytes))
        # Whoever waits for idleness does not wait for bodies: one that came too late must not begin.
        self.health.check_accepting()
        self._num_generating += 1
        self._idle.clear()
        try:
            request: SamplingFields = decoder.decode(body)
            self._check_model(request.model)
            fields = self._routing_fields(request, exchange)
            plan = await plan_request(request, self._served)
            reply = Reply(plan, fields, self._engine, self._metrics, exchange, self._stream_interval_s)
            await reply.respond(receive, Outlet(send, self._write_round), self._interruption)
        finally:
            self._num_generating -= 1
            if self._num_generating == 0:
                self._idle.set()

    def _routing_fields(self, request: SamplingFields, exchange: Exchange) -> DynamoFields:
        fields = read_fields(request.dynamo, exchange.headers)
        if fields.worker is not None and self._routed is None:
            raise no_such_worker(fields.worker, "this server has no workers beside itself")
        return fields

    def _explaining(self, routed: Routed) -> Handler:
        async def handle(exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
            self.health.check_accepting()
            body = await self._arriving.guard(read_json_body(exchange, receive, self._max_body_bytes))
            request, plan_request = self._decoded(body)
            self._check_model(request.model)
            fields = self._routing_fields(request, exchange)

            async def work() -> bytes:
                plan = await plan_request(request, self._served)
                return msgspec.json.encode(await explain(plan, routing_hints(fields), routed))

            await send_body(send, exchange, 200, await run_interruptible(work(), receive, self._interruption))

        return handle

    def _decoded(self, body: bytes) -> tuple[SamplingFields, Callable[[Any, ServedModel], Awaitable[ReplyPlan]]]:
        """A body of either generating endpoint."""
        if is_chat(body):
            return self._chat_decoder.decode(body), plan_chat
        return self._completion_decoder.decode(body), plan_completion

    def _administer(self, admin: CacheAdmin, operation: Operation) -> Handler:
        max_bytes = min(self._max_body_bytes, MAX_ADMIN_BODY_BYTES)

        async def handle(exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
            body = None
            if operation.decoder is not None:
                content = await self._arriving.guard(read_json_body(exchange, receive, max_bytes))
                body = operation.decoder.decode(content)

            async def work() -> Any:
                return await operation.run(admin, body, scope["path_params"])

            answer = await run_interruptible(work(), receive, self._arriving)
            await send_body(send, exchange, 200, msgspec.json.encode(answer))

        return handle

    def _check_model(self, name: str) -> None:
        if name != self._served.name:
            message = f"the model {name[:200]!r} is not served here; served is {self._served.name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    def _card(self) -> ModelCard:
        served = self._served
        return ModelCard(served.name, "model", served.created, "dynamo", served.max_model_len)

    async def _models(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, exchange, 200, msgspec.json.encode(ModelList("list", [self._card()])))

    async def _model(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_model(cast(str, scope["path_params"]["model"]))
        await send_body(send, exchange, 200, msgspec.json.encode(self._card()))

    async def _health(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        readiness = self.health.readiness
        status = 200 if readiness is Readiness.READY else 503
        await send_body(send, exchange, status, msgspec.json.encode({"status": readiness.value}))

    async def _live(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, exchange, 200, b'{"status":"live"}')

    async def _scrape(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        body = generate_latest(self._registry)
        await send_body(send, exchange, 200, body, content_type=CONTENT_TYPE_LATEST.encode())

    def _scraping(self, routed: Routed) -> Handler:
        async def handle(exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
            pages = await run_interruptible(routed.worker_metrics(), receive, self._arriving)
            body = await asyncio.to_thread(merge_metrics, pages)
            await send_body(send, exchange, 200, body, content_type=CONTENT_TYPE_LATEST.encode())

        return handle

    async def _openapi_json(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, exchange, 200, self._openapi)

    async def _docs(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, exchange, 200, DOCS_HTML, DOCS_HEADERS, content_type=b"text/html; charset=utf-8")

    async def _root(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, exchange, 307, b"", [(b"location", b"/docs")])


def _no_administration(path: str, *, is_front: bool) -> RequestError:
    why = (
        "a front keeps no cache, and the caches of workers are not administered over HTTP; /metrics/workers shows them"
        if is_front
        else "administration is off; start the server with --admin"
    )
    return RequestError(f"there is nothing at {path}: {why}", status=404, code="unknown_url")


async def _refuse(send: Send, exchange: Exchange, refusal: RequestError, headers: Any, hangs_up: bool) -> None:
    """Answers with the error; `headers` are those of Starlette's own exceptions, such as Allow."""
    extra = [(name.lower().encode(), value.encode()) for name, value in dict(headers or {}).items()]
    if refusal.status in (429, 503):
        extra.append(_RETRY_AFTER)
    if refusal.status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    await send_body(send, exchange, refusal.status, envelope(refusal), extra, hangs_up=hangs_up)
