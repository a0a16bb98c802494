"""A worker that somebody else wrote: any server with OpenAI's /v1/completions, such as vLLM, SGLang, or another one of ours.

The prompt goes there as token ids. Where the server returns token ids too (vLLM's `return_token_ids`, asked for once when
the server is met), this front turns them into text itself: stop strings, half characters and the place where the text ends
are then as with a worker of ours, and a request can be carried on from the very token where another worker stopped.

| | with token ids | without |
| --- | --- | --- |
| text | made here from the ids | the server's |
| stop strings | found here; one that began at another worker is found too | the server's; one across a carry-on is missed |
| completion tokens | exact | what this front's tokenizer makes of the text |
| carried on from here | yes | only while nothing was delivered |
| carried on to here | yes | yes |

What a carry-on cannot take along to such a server: the state of its random numbers (a seed of the request's is moved on by
the number of tokens, so that no draw repeats) and presence and frequency penalties of the tokens before.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec

from dynamo.serve.engine.request import GenerationRequest, OutputDelta
from dynamo.serve.errors import EngineOverloadedError, RequestError, WorkerLostError
from dynamo.serve.external_answer import ExternalAnswer, Spelling
from dynamo.serve.external_wire import (
    UNREADABLE,
    Chunk,
    ModelCards,
    completion_body,
    error_of,
    read_bounded,
    read_chunks,
)

__all__ = ["ExternalModel", "ExternalTimeouts", "ExternalWorker"]

_JSON: Final = {"content-type": "application/json"}
_OVERLOADED: Final = 429
# Not the client's fault: this front has the wrong key or model name, or the server is no such server.
_MISCONFIGURED: Final = (401, 403, 404, 405)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalTimeouts:
    """Seconds.

    Attributes:
        connect_s: to open a connection.
        idle_s: to wait for the next bytes of an answer; the first ones come when the prompt is computed.
        probe_s: for a whole question about health or models.
    """

    connect_s: float = 5.0
    idle_s: float = 120.0
    probe_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalModel:
    """What the server says of itself.

    Attributes:
        name: of the model there.
        max_model_len: most tokens of prompt and completion; None where it does not say.
        extras: the fields beyond OpenAI's, of those that help, that it takes.
        has_token_ids: whether its answers have token ids.
    """

    name: str
    max_model_len: int | None
    extras: tuple[str, ...]
    has_token_ids: bool


class ExternalWorker:
    """The way to one such server; implements `dynamo.serve.plane.link.WorkerLink`. Used on one event loop.

    Args:
        url: where its API is, without /v1, such as http://127.0.0.1:8001.
        spelling: the tokenizer of the model, which must be the server's as well.
        eos_token_ids: tokens that end a generation.
        max_model_len: most tokens that this front accepts.
        model: its name there; None: the one model the server lists first.
        api_key: sent to it; None: none.
    """

    def __init__(
        self,
        worker_id: str,
        url: str,
        spelling: Spelling,
        *,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        model: str | None = None,
        api_key: str | None = None,
        timeouts: ExternalTimeouts | None = None,
    ) -> None:
        self._worker_id = worker_id
        self._url = url.rstrip("/")
        self._spelling = spelling
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._wanted_model = model
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._timeouts = timeouts or ExternalTimeouts()
        self._model: ExternalModel | None = None
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False

    @property
    def worker_id(self) -> str:
        return self._worker_id

    @property
    def model(self) -> ExternalModel | None:
        """What `connect` learnt; None before."""
        return self._model

    async def connect(self) -> ExternalModel:
        """Asks the server what it serves and what it can do. Again after it was restarted.

        Raises:
            WorkerLostError: it does not answer, not in time, or not like such a server.
        """
        name, max_model_len = await self._find_model()
        for extras in (("return_token_ids", "return_tokens_as_token_ids"), ("return_token_ids",), ()):
            has_token_ids = await self._try_extras(name, extras)
            if has_token_ids is not None:
                break
        else:
            raise self._lost("it refuses the smallest completion; is it a completion server?")
        self._model = ExternalModel(
            name=name, max_model_len=max_model_len, extras=extras if has_token_ids else (), has_token_ids=has_token_ids
        )
        return self._model

    async def check_health(self) -> None:
        """Asks whether the server works.

        Raises:
            WorkerLostError: it does not, or does not answer in time.
        """
        status, _ = await self._ask("GET", "/health")
        if status in _MISCONFIGURED:  # no such page: then it is well if it tells its models
            status, _ = await self._ask("GET", "/v1/models")
        if status != 200:
            raise self._lost(f"its health check answers {status}")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[OutputDelta], None]:
        """See `WorkerLink.generate`.

        Raises:
            RequestError: the server refuses the request, in its own words.
        """
        model = self._model or await self.connect()
        if request.sampling.num_logprobs is not None and not model.has_token_ids:
            raise RequestError(
                f"worker {self._worker_id} gives no token ids, and so no logprobs; leave logprobs out",
                param="logprobs",
                code="unsupported_parameter",
            )
        answer = ExternalAnswer(
            self._worker_id,
            request,
            self._spelling,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self._max_model_len,
            has_token_ids=model.has_token_ids,
        )
        try:
            response = await self._post(request, model)
            try:
                if response.status != 200:
                    raise self._refusal(response.status, await read_bounded(response.content))
                async for chunks, is_done in read_chunks(response.content, self._timeouts.idle_s):
                    if deltas := answer.take(chunks, is_done):
                        yield deltas
                    if answer.is_over:
                        return
                    if answer.failure is not None:
                        raise answer.failure
            finally:
                response.close()  # not released: the server is to notice at once that nobody listens
        except (aiohttp.ClientError, TimeoutError, OSError, *UNREADABLE) as error:
            failure = answer.broken(f"{type(error).__name__}: {error}")
        else:
            failure = answer.broken("its answer ended before the text did")
        if deltas := answer.drain():
            yield deltas
        else:
            raise failure

    async def close(self) -> None:
        """Ends the link and every request on it. Idempotent."""
        self._is_closed = True
        if self._session is not None:
            await self._session.close()

    async def _post(self, request: GenerationRequest, model: ExternalModel) -> aiohttp.ClientResponse:
        return await self._open().post(
            f"{self._url}/v1/completions",
            data=completion_body(request, model.name, model.extras, stops_here=model.has_token_ids),
            headers={**self._headers, **_JSON, "x-request-id": request.request_id},
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._timeouts.connect_s, sock_read=self._timeouts.idle_s
            ),
        )

    def _open(self) -> aiohttp.ClientSession:
        if self._is_closed:
            raise self._lost("this front has closed the way to it")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    async def _find_model(self) -> tuple[str, int | None]:
        status, body = await self._ask("GET", "/v1/models")
        if status != 200:
            raise self._lost(f"/v1/models answers {status}: {error_of(body).message}")
        try:
            cards = msgspec.json.decode(body, type=ModelCards).data
        except UNREADABLE as error:
            raise self._lost(f"/v1/models is not as at OpenAI: {error}") from error
        for card in cards:
            if self._wanted_model in (None, card.id):
                return card.id, card.max_model_len
        names = ", ".join(repr(card.id) for card in cards[:8]) or "no model at all"
        raise self._lost(f"it does not serve {self._wanted_model!r}, but {names}")

    async def _try_extras(self, model: str, extras: tuple[str, ...]) -> bool | None:
        """Whether one token, asked for with these fields, comes with its id; None if the server refuses the fields."""
        asked: dict[str, Any] = {"model": model, "prompt": [0], "max_tokens": 1, "temperature": 0}
        status, body = await self._ask("POST", "/v1/completions", {**asked, **dict.fromkeys(extras, True)})
        if status in (400, 422):
            return None
        if status != 200:
            raise self._lost(f"/v1/completions answers {status}: {error_of(body).message}")
        try:
            choices = msgspec.json.decode(body, type=Chunk).choices
        except UNREADABLE as error:
            raise self._lost(f"/v1/completions is not as at OpenAI: {error}") from error
        return bool(choices and choices[0].token_ids)

    async def _ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        try:
            async with (
                asyncio.timeout(self._timeouts.probe_s),
                self._open().request(
                    method,
                    self._url + path,
                    data=None if body is None else msgspec.json.encode(body),
                    headers={**self._headers, **_JSON} if body is not None else self._headers,
                    allow_redirects=False,
                ) as response,
            ):
                return response.status, await read_bounded(response.content)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._lost(f"{path}: {type(error).__name__}: {error}") from error

    def _refusal(self, status: int, body: bytes) -> Exception:
        told = error_of(body)
        if status == _OVERLOADED:
            return EngineOverloadedError(f"{self._worker_id} answers 429: {told.message}")
        if 400 <= status < 500 and status not in _MISCONFIGURED:
            return RequestError(told.message, status=status, type=told.type, param=told.param, code=told.code)
        return self._lost(f"it answers {status}: {told.message}")

    def _lost(self, reason: str) -> WorkerLostError:
        return WorkerLostError(self._worker_id, reason)
