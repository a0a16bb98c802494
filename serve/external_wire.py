"""OpenAI's completion protocol as a client speaks it: the body of a request, the events of its answer, and refusals.

Whatever a server sends is bounded in size, and fields that are not known here are passed over.
"""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import aiohttp
import msgspec

from dynamo.serve.engine.request import GenerationRequest
from dynamo.serve.openai import ErrorBody

__all__ = [
    "UNREADABLE",
    "Choice",
    "Chunk",
    "Logprobs",
    "ModelCards",
    "completion_body",
    "error_of",
    "read_bounded",
    "read_chunks",
]

_MAX_EVENT_BYTES: Final = 8 << 20
_MAX_BODY_BYTES: Final = 1 << 20
_MAX_MESSAGE_CHARS: Final = 2000
_SEED_MASK: Final = 2**63 - 1


class Logprobs(msgspec.Struct):
    """Of one chunk's tokens; the keys of `top_logprobs` are texts, or "token_id:7" where that was asked for."""

    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct):
    """What a chunk adds."""

    text: str = ""
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class PromptDetails(msgspec.Struct):
    """How much of the prompt was not computed."""

    cached_tokens: int | None = None


class UsageFigures(msgspec.Struct):
    """The part of the usage that is not known here already."""

    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct):
    """One event of a stream, or a whole answer."""

    choices: list[Choice] = []
    usage: UsageFigures | None = None
    error: Any = None


class ServedCard(msgspec.Struct):
    """One model of /v1/models; servers differ in whether they tell its length."""

    id: str
    max_model_len: int | None = None


class ModelCards(msgspec.Struct):
    """Answer of /v1/models."""

    data: list[ServedCard]


UNREADABLE: Final = (ValueError, RecursionError)
"""What is raised for bytes that are no JSON of the form expected: msgspec's errors, text that is no UTF-8, endless nesting."""

_chunks = msgspec.json.Decoder(Chunk)


def completion_body(request: GenerationRequest, model: str, extras: Sequence[str], *, stops_here: bool) -> bytes:
    """The body of POST /v1/completions for what is still to be generated of `request`.

    Every value that a server would fill in by itself is given: its defaults may not be this front's.

    Args:
        extras: boolean fields that are set because the server knows them.
        stops_here: stop strings are found by this front, so the server is not told of them.
    """
    sampling, num_done = request.sampling, len(request.output_token_ids)
    body: dict[str, Any] = {
        "model": model,
        "prompt": [*request.prompt_token_ids, *request.output_token_ids],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": sampling.max_tokens - num_done,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1 if sampling.top_k is None else sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        **dict.fromkeys(extras, True),
    }
    optional: dict[str, Any] = {
        "seed": None if sampling.seed is None else (sampling.seed + num_done) & _SEED_MASK,
        "min_tokens": max(0, sampling.min_tokens - num_done) or None,
        "stop": None if stops_here else list(sampling.stop) or None,
        "stop_token_ids": sorted(sampling.stop_token_ids) or None,
        "ignore_eos": sampling.ignore_eos or None,
        "logprobs": sampling.num_logprobs,
        "cache_salt": request.cache_salt or None,
    }
    return msgspec.json.encode(body | {name: value for name, value in optional.items() if value is not None})


def error_of(body: bytes | Any) -> ErrorBody:
    """What a refusal says, or an error event's value, as well as it can be read."""
    value = body
    if isinstance(body, bytes):
        try:
            value = msgspec.json.decode(body)
        except UNREADABLE:
            value = body.decode(errors="replace")
    if isinstance(value, dict) and "error" in value:
        value = value["error"]
    fields = value if isinstance(value, dict) else {"message": value}
    texts = {name: None if fields.get(name) is None else str(fields[name]) for name in ("type", "param", "code")}
    message = fields.get("message") or fields.get("detail") or "no reason given"
    return ErrorBody(
        message=str(message)[:_MAX_MESSAGE_CHARS],
        type=texts["type"] or "invalid_request_error",
        param=texts["param"],
        code=texts["code"],
    )


async def read_bounded(content: aiohttp.StreamReader) -> bytes:
    """A whole body.

    Raises:
        ValueError: it is larger than any that such an answer has.
    """
    parts: list[bytes] = []
    num_bytes = 0
    while part := await _read(content):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > _MAX_BODY_BYTES:
            raise ValueError(f"the body is larger than {_MAX_BODY_BYTES} bytes")
    return b"".join(parts)


async def read_chunks(content: aiohttp.StreamReader, idle_s: float) -> AsyncIterator[tuple[list[Chunk], bool]]:
    """The chunks of a stream of events, as many as have arrived together, and whether `[DONE]` was among the events.

    Args:
        idle_s: a server that sends only comments for so long, which keep the connection alive, has nothing to say.

    Raises:
        TimeoutError: nothing but comments came for too long.
        ValueError, RecursionError: an event is no chunk, or larger than any chunk is.
    """
    unfinished = bytearray()
    heard_s = time.monotonic()
    while part := await _read(content):
        begun = max(0, len(unfinished) - 3)
        unfinished += part
        # Events end with an empty line; servers write either kind of line break. Only what is new is searched for one.
        if unfinished.find(b"\n\n", begun) < 0 and unfinished.find(b"\n\r\n", begun) < 0:
            if len(unfinished) > _MAX_EVENT_BYTES:
                raise ValueError(f"an event is larger than {_MAX_EVENT_BYTES} bytes")
            continue
        *events, rest = bytes(unfinished).replace(b"\r\n", b"\n").split(b"\n\n")
        unfinished = bytearray(rest)
        data = [line[5:].strip() for event in events for line in event.split(b"\n") if line.startswith(b"data:")]
        if data:
            yield [_chunks.decode(text) for text in data if text != b"[DONE]"], b"[DONE]" in data
            heard_s = time.monotonic()
        elif time.monotonic() - heard_s > idle_s:
            raise TimeoutError(f"nothing but comments came for {idle_s:g} s")


async def _read(content: aiohttp.StreamReader) -> bytes:
    try:
        return await content.readany()
    except RuntimeError as error:  # aiohttp's word for a session that was closed while nobody was reading
        raise ConnectionResetError(str(error)) from error
