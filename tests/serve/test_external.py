"""A scripted server that speaks as vLLM does, behind a real uvicorn, and one of ours."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from dynamo.serve.engine.request import GenerationRequest, OutputDelta, SamplingParams
from dynamo.serve.errors import EngineOverloadedError, RequestError, RequestFailedError, WorkerLostError
from dynamo.serve.external import ExternalTimeouts, ExternalWorker
from dynamo.serve.frontend import Frontend
from dynamo.serve.served_model import ServedModel

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
        raw: pieces that come instead of all events; the last one again and again if `hold` is set.
        models: this instead of the list of models.
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
    raw: Sequence[bytes] = ()
    models: bytes = json.dumps({"object": "list", "data": [{"id": "m", "max_model_len": 99, "root": "x"}]}).encode()
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
                await say(send, 200, self.models)
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
        for piece in self.raw:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        while self.raw and self.hold and not self.aborted.is_set():
            await send({"type": "http.response.body", "body": self.raw[-1], "more_body": True})
            await asyncio.sleep(0.02)
        if self.raw:
            return
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
                    "top_logprobs": [
                        {f"token_id:{one}": -0.5, "token_id:7": -0.25, "token_id:8": -9.0} for one in part
                    ],
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
    await say(send, status, json.dumps(body).encode())


async def say(send: Send, status: int, content: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def event(send: Send, value: Any) -> None:
    await send(
        {"type": "http.response.body", "body": b"data: " + json.dumps(value).encode() + b"\n\n", "more_body": True}
    )


class Quiet(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The app behind uvicorn on a free port, on this loop."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Quiet(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await task


PROMPT = [1, 2, 3]


def request(max_tokens: int = 50, **sampling: Any) -> GenerationRequest:
    fields = {name: sampling.pop(name) for name in ("cache_salt", "output_token_ids") if name in sampling}
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return GenerationRequest(request_id="r#1", prompt_token_ids=PROMPT, sampling=params, **fields)


@asynccontextmanager
async def linked(app: Any, codec: Any, **options: Any) -> AsyncIterator[ExternalWorker]:
    async with served(app) as url:
        link = ExternalWorker(
            "there",
            url,
            codec,
            eos_token_ids=frozenset([257]),
            max_model_len=99,
            timeouts=options.pop("timeouts", TIMEOUTS),
            **options,
        )
        try:
            yield link
        finally:
            await link.close()


async def collect(link: ExternalWorker, asked: GenerationRequest) -> list[OutputDelta]:
    async with aclosing(link.generate(asked)) as gains:
        return [delta async for deltas in gains for delta in deltas]


def text_of(deltas: list[OutputDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[OutputDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def ask(run: Any, codec: Any, app: Foreign, asked: GenerationRequest, **options: Any) -> list[OutputDelta]:
    async def work() -> list[OutputDelta]:
        async with linked(app, codec, **options) as link:
            return await collect(link, asked)

    deltas: list[OutputDelta] = run(work())
    return deltas


def test_the_server_is_asked_once_what_it_can_do(run: Any, codec: Any) -> None:
    async def probe(app: Foreign) -> tuple[tuple[str, ...], bool]:
        async with linked(app, codec) as link:
            model = await link.connect()
            assert link.model == model
            assert (model.name, model.max_model_len) == ("m", 99)
            await link.check_health()
            return model.extras, model.has_token_ids

    both = ("return_token_ids", "return_tokens_as_token_ids")
    assert run(probe(Foreign())) == (both, True)
    assert run(probe(Foreign(known=("return_token_ids",)))) == (("return_token_ids",), True)
    assert run(probe(Foreign(known=()))) == ((), False)


@pytest.mark.parametrize("known", [("return_token_ids", "return_tokens_as_token_ids"), ()])
@pytest.mark.parametrize("tokens_per_chunk", [1, 3, 50])
def test_text_tokens_and_cached_tokens_come_through(
    run: Any, codec: Any, known: tuple[str, ...], tokens_per_chunk: int
) -> None:
    deltas = ask(run, codec, Foreign(known=known, tokens_per_chunk=tokens_per_chunk), request())
    assert text_of(deltas) == "Hello, world."
    assert ids_of(deltas) == list(b"Hello, world.")
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    assert deltas[-1].finish_reason == "stop" and deltas[-1].num_cached_tokens == 3


def test_characters_are_never_split_where_the_ids_are_known(run: Any, codec: Any) -> None:
    deltas = ask(run, codec, Foreign(reply="né→"), request())
    assert text_of(deltas) == "né→" and not any("\ufffd" in delta.text for delta in deltas)


def test_every_sampling_parameter_is_sent_by_its_name(run: Any, codec: Any) -> None:
    app = Foreign()
    asked = request(
        9,
        temperature=0.5,
        top_p=0.75,
        top_k=4,
        min_p=0.125,
        presence_penalty=1.0,
        frequency_penalty=0.5,
        repetition_penalty=1.5,
        seed=7,
        min_tokens=2,
        stop=("zz",),
        stop_token_ids=frozenset([5, 4]),
        ignore_eos=True,
        num_logprobs=1,
        cache_salt="salt",
    )
    ask(run, codec, app, asked, api_key="secret")
    assert app.bodies == [
        {
            "model": "m",
            "prompt": PROMPT,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.75,
            "top_k": 4,
            "min_p": 0.125,
            "presence_penalty": 1.0,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.5,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "seed": 7,
            "min_tokens": 2,
            "stop_token_ids": [4, 5],
            "ignore_eos": True,
            "logprobs": 1,
            "cache_salt": "salt",
        }
    ]
    assert app.headers[-1][b"authorization"] == b"Bearer secret"
    assert app.headers[-1][b"x-request-id"] == b"r#1"


def test_what_a_default_would_change_is_said_and_the_rest_left_out(run: Any, codec: Any) -> None:
    app = Foreign(known=())
    ask(run, codec, app, request(stop=("zz",)))
    body = app.bodies[0]
    assert (body["top_k"], body["temperature"], body["repetition_penalty"]) == (-1, 1.0, 1.0)
    assert body["stop"] == ["zz"], "the server finds them, as this front does not know the tokens"
    assert not {"seed", "min_tokens", "ignore_eos", "logprobs", "cache_salt", "return_token_ids"} & body.keys()


def test_a_carried_on_request_goes_on_after_its_tokens(run: Any, codec: Any) -> None:
    app = Foreign()
    asked = request(20, output_token_ids=list(b"Hello"), min_tokens=8, seed=2**63 - 1)
    deltas = ask(run, codec, app, asked)
    assert text_of(deltas) == ", world." and ids_of(deltas) == list(b", world.")
    body = app.bodies[0]
    assert body["prompt"] == [*PROMPT, *b"Hello"]
    assert (body["max_tokens"], body["min_tokens"], body["seed"]) == (15, 3, 4)


@pytest.mark.parametrize("known", [("return_token_ids",), ()])
def test_text_that_the_worker_before_held_back_is_not_lost(run: Any, codec: Any, known: tuple[str, ...]) -> None:
    asked = request(20, output_token_ids=list(b"Hello"), stop=("o, x",))  # "o" may have become the stop string
    assert text_of(ask(run, codec, Foreign(known=known), asked)) == "o, world."


@pytest.mark.parametrize("done", [0, 4, 6])
def test_a_stop_string_ends_the_text_wherever_it_began(run: Any, codec: Any, done: int) -> None:
    async def work() -> tuple[list[OutputDelta], bool]:
        app = Foreign(tokens_per_chunk=2, hold=done == 0)
        app.hold = False
        async with linked(app, codec) as link:
            deltas = await collect(link, request(stop=("o, w",), output_token_ids=list(b"Hello, world."[:done])))
            return deltas, "stop" in app.bodies[0]

    deltas, was_told = run(work())
    assert not was_told
    assert "Hell".startswith(text_of(deltas)) or text_of(deltas) == "Hell"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "o, w")
    assert ids_of(deltas) == list(b"Hello, w")[done:]


def test_ends_of_the_server_are_told_as_ours(run: Any, codec: Any) -> None:
    assert ask(run, codec, Foreign(), request(5))[-1].finish_reason == "length"
    by_token = ask(run, codec, Foreign(), request(stop_token_ids=frozenset([ord("w")])))
    assert (text_of(by_token), by_token[-1].stop_reason) == ("Hello, ", ord("w"))
    last = ask(run, codec, Foreign(finish=("stop", "x"), known=()), request())[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", "x")


def test_logprobs_come_with_token_ids_or_not_at_all(run: Any, codec: Any) -> None:
    deltas = ask(run, codec, Foreign(tokens_per_chunk=2), request(num_logprobs=2))
    entries = [entry for delta in deltas for entry in delta.logprobs or ()]
    assert [entry.token_id for entry in entries] == list(b"Hello, world.")
    assert entries[0].logprob == -0.5 and entries[0].top == ((7, -0.25), (ord("H"), -0.5))
    with pytest.raises(RequestError) as refused:
        ask(run, codec, Foreign(known=()), request(num_logprobs=0))
    assert refused.value.param == "logprobs"


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (429, {"message": "full"}, EngineOverloadedError),
        (400, {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": 400}, RequestError),
        (401, {"message": "who are you"}, WorkerLostError),
        (404, {"message": "no such model"}, WorkerLostError),
        (500, {"message": "oh"}, WorkerLostError),
        (503, "not even an object", WorkerLostError),
    ],
)
def test_refusals_are_told_apart(run: Any, codec: Any, status: int, error: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind) as refused:
        ask(run, codec, Foreign(refuse=(status, {"error": error})), request())
    if isinstance(refused.value, RequestError):
        assert (refused.value.status, refused.value.message, refused.value.param) == (400, "too long", "prompt")


@pytest.mark.parametrize("known", [("return_token_ids",), ()])
@pytest.mark.parametrize("failure", [{"break_after": 2}, {"error_after": {"message": "died", "code": 500}}])
def test_a_broken_answer_can_be_carried_on_where_its_tokens_are_known(
    run: Any, codec: Any, known: tuple[str, ...], failure: dict[str, Any]
) -> None:
    taken: list[OutputDelta] = []

    async def work() -> None:
        async with linked(Foreign(known=known, **failure), codec) as link, aclosing(link.generate(request())) as gains:
            async for deltas in gains:
                taken.extend(deltas)

    with pytest.raises(WorkerLostError if known else RequestFailedError, match="there"):
        run(work())
    assert text_of(taken) == "He"


def test_an_error_event_about_the_request_is_not_carried_on(run: Any, codec: Any) -> None:
    with pytest.raises(RequestFailedError, match="bad"):
        ask(run, codec, Foreign(error_after={"message": "bad", "code": 400}), request())


def test_an_answer_that_ends_early_without_breaking_is_lost_as_well(run: Any, codec: Any) -> None:
    class Short(Foreign):
        async def _stream(self, body: dict[str, Any], send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await event(send, {"choices": [{"text": "H", "token_ids": [72], "finish_reason": None}]})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    with pytest.raises(WorkerLostError, match="ended before the text did"):
        ask(run, codec, Short(), request())


def test_the_last_token_is_not_lost_where_the_server_says_nothing_after_it(run: Any, codec: Any) -> None:
    assert text_of(ask(run, codec, Foreign(cached_tokens=None, has_done=False), request())) == "Hello, world."


def test_a_server_that_says_nothing_more_is_lost_in_time(run: Any, codec: Any) -> None:
    with pytest.raises(WorkerLostError, match="Timeout"):
        ask(run, codec, Foreign(hold=True), request(), timeouts=ExternalTimeouts(idle_s=0.2))


DEEP = b'{"error":' + 20_000 * b"[" + 20_000 * b"]" + b"}"


@pytest.mark.parametrize(
    "raw",
    [
        [b"<html>come again later</html>"],
        [b"data: " + DEEP + b"\n\n"],
        [b'data: {"choices": [{"text": "\xff", "token_ids": [65]}]}\n\n'],
        [b'data: {"choices": [{"text": "a", "token_ids": [-1]}]}\n\n'],
        [b'data: {"choices": [{"text": "a", "token_ids": [4294967296]}]}\n\n'],
        [b"data: ", *(9 * [bytes(1 << 20)])],
    ],
    ids=["html", "deep", "no text", "negative", "too large an id", "endless"],
)
def test_a_server_that_says_what_it_must_not_is_lost(run: Any, codec: Any, raw: list[bytes]) -> None:
    with pytest.raises(WorkerLostError):
        ask(run, codec, Foreign(raw=raw), request())


@pytest.mark.parametrize("models", [DEEP, b'{"data": [{"id": "\xff"}]}', b"<html>"], ids=["deep", "no text", "html"])
def test_a_server_whose_models_cannot_be_read_is_lost(run: Any, codec: Any, models: bytes) -> None:
    with pytest.raises(WorkerLostError, match="/v1/models"):
        ask(run, codec, Foreign(models=models), request())


def test_a_server_that_only_keeps_the_connection_alive_is_lost_in_time(run: Any, codec: Any) -> None:
    timeouts = ExternalTimeouts(connect_s=2.0, idle_s=0.3, probe_s=2.0)
    with pytest.raises(WorkerLostError, match="nothing but comments"):
        ask(run, codec, Foreign(raw=[b": ping\n\n"], hold=True), request(), timeouts=timeouts)


@pytest.mark.parametrize(("told", "believed"), [(-3, 0), (2, 2), (10**9, len(PROMPT))])
def test_no_more_of_the_prompt_was_cached_than_there_is(run: Any, codec: Any, told: int, believed: int) -> None:
    assert ask(run, codec, Foreign(cached_tokens=told), request())[-1].num_cached_tokens == believed


def test_closing_the_generator_ends_the_request_there(run: Any, codec: Any) -> None:
    async def work() -> None:
        app = Foreign(hold=True)
        async with linked(app, codec) as link:
            gains = link.generate(request())
            await anext(gains)
            await gains.aclose()
            async with asyncio.timeout(2):
                await app.aborted.wait()

    run(work())


def test_closing_the_link_ends_its_requests_and_takes_no_more(run: Any, codec: Any) -> None:
    async def work() -> None:
        app = Foreign(hold=True)
        async with linked(app, codec) as link:
            gains = link.generate(request())
            await anext(gains)
            await link.close()
            with pytest.raises(WorkerLostError):
                await anext(gains)
            with pytest.raises(WorkerLostError, match="closed"):
                await collect(link, request())

    run(work())


def test_nobody_listening_is_a_lost_worker(run: Any, codec: Any) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        link = ExternalWorker(
            "there", f"http://127.0.0.1:{port}", codec, eos_token_ids=frozenset(), max_model_len=9, timeouts=TIMEOUTS
        )
        for attempt in (link.connect, link.check_health, lambda: collect(link, request())):
            with pytest.raises(WorkerLostError, match="ClientConnectorError"):
                await attempt()
        await link.close()

    run(work())


@pytest.mark.parametrize("health", [200, 404, 503])
def test_health_is_what_the_server_says_of_itself(run: Any, codec: Any, health: int) -> None:
    async def work() -> None:
        async with linked(Foreign(health=health), codec) as link:
            await link.check_health()

    if health == 503:
        with pytest.raises(WorkerLostError, match="503"):
            run(work())
    else:
        run(work())


def test_a_model_it_does_not_serve_is_named(run: Any, codec: Any) -> None:
    with pytest.raises(WorkerLostError, match="does not serve 'other', but 'm'"):
        ask(run, codec, Foreign(), request(), model="other")


def test_a_server_that_goes_on_after_the_end_is_not_listened_to(run: Any, codec: Any) -> None:
    app = Foreign(reply="Hi" + "." * 40)
    asked = request(40, stop_token_ids=frozenset([ord("i")]))
    deltas = ask(run, codec, app, asked)
    assert (text_of(deltas), deltas[-1].stop_reason) == ("H", ord("i"))


@pytest.mark.parametrize("stop", [(), ("o, w",)])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_one_of_our_own_servers_serves_as_well(
    run: Any, codec: Any, scripted: Any, stop: tuple[str, ...], logprobs: int | None
) -> None:
    async def work() -> None:
        engine = scripted(num_cached_tokens=2, reply="Hello, wörld.")
        model = ServedModel(name="scripted", codec=codec, max_model_len=99)
        async with linked(Frontend(engine, model), codec) as link:
            learnt = await link.connect()
            assert (learnt.name, learnt.max_model_len) == ("scripted", 99)
            assert (learnt.extras, learnt.has_token_ids) == (("return_token_ids",), True)
            deltas = await collect(link, request(stop=stop, temperature=0.5, seed=3, num_logprobs=logprobs))
            whole = "Hello, wörld."
            assert text_of(deltas) == (whole.partition(stop[0])[0] if stop else whole)
            assert deltas[-1].finish_reason == "stop"
            if not stop:
                assert ids_of(deltas) == list(whole.encode()) and deltas[-1].num_cached_tokens == 2
            entries = [entry for delta in deltas for entry in delta.logprobs or ()]
            assert [entry.token_id for entry in entries] == (ids_of(deltas) if logprobs else [])
            await link.check_health()
            asked = engine.requests[-1].sampling
            assert (asked.temperature, asked.seed, asked.top_k, asked.stop) == (0.5, 3, None, ())
            engine.overloaded = True
            with pytest.raises(EngineOverloadedError):
                await collect(link, request())
            engine.overloaded, engine.dead = False, True
            with pytest.raises(WorkerLostError, match="503"):
                await collect(link, request())
            with pytest.raises(WorkerLostError, match="503"):
                await link.check_health()

    run(work())
