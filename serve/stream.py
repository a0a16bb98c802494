"""Server-sent events of the two generating endpoints, spliced from bytes rendered once per request.

A chunk costs the encoding of its text and one join: no object is built and no field is encoded per token.
Several chunks that are ready at the same time leave in one write.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from dynamo.serve.engine.request import OutputDelta
from dynamo.serve.envelope import envelope
from dynamo.serve.errors import RequestError
from dynamo.serve.logprobs import LegacyLogprobs, chat_logprobs
from dynamo.serve.merging import Batch
from dynamo.serve.openai import RouteTiming, Usage
from dynamo.serve.prompt import TextCodec

__all__ = ["DONE", "SSE_HEADERS", "ChatStream", "ChunkStream", "CompletionStream", "error_event"]

DONE = b"data: [DONE]\n\n"
SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect events
)

_encode = msgspec.json.Encoder().encode


class ChunkStream(Protocol):
    """Renders the chunks of one response."""

    def render(self, batch: Batch) -> bytes:
        """The events of `batch`; empty while all of its text is held back."""
        ...

    def last_chunk(self, usage: Usage | None, timing: RouteTiming | None) -> bytes:
        """The chunk without choices that closes a stream whose client asked for usage, timing, or both."""
        ...


def error_event(error: RequestError) -> bytes:
    """The last event of a stream that failed; [DONE] never follows it."""
    return b"data: " + envelope(error) + b"\n\n"


class _Templates:
    """The constant parts of all chunks of one response."""

    def __init__(self, response_id: str, kind: str, created: int, model: str, include_usage: bool) -> None:
        head = _encode({"id": response_id, "object": kind, "created": created, "model": model})
        self.head = b"data: " + head[:-1] + b',"choices":['
        self.tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def finish(self, prefix: bytes, nothing: bytes, delta: OutputDelta) -> tuple[bytes, ...]:
        """The parts of a choice's last chunk; `nothing` is what stands there for its text."""
        reasons = _encode(delta.finish_reason), b',"stop_reason":', _encode(delta.stop_reason)
        return prefix, nothing, b',"logprobs":null,"finish_reason":', *reasons, self.tail

    def last_chunk(self, usage: Usage | None, timing: RouteTiming | None) -> bytes:
        parts = [self.head, b"]"]
        if usage is not None:
            parts += (b',"usage":', _encode(usage))
        if timing is not None:
            parts += (b',"dynamo":', _encode(timing))
        return b"".join((*parts, b"}\n\n"))


class ChatStream:
    """Chunks of a chat completion: per choice one with the role, those with text, and one with the finish reason.

    Args:
        codec: given when logprobs were asked for.
    """

    def __init__(
        self,
        response_id: str,
        created: int,
        model: str,
        num_choices: int,
        *,
        include_usage: bool,
        codec: TextCodec | None = None,
    ) -> None:
        self._templates = _Templates(response_id, "chat.completion.chunk", created, model, include_usage)
        self._prefixes = [b'%s{"index":%d,"delta":{' % (self._templates.head, index) for index in range(num_choices)]
        self._role_sent = [False] * num_choices
        self._unfinished = b'},"logprobs":null,"finish_reason":null' + self._templates.tail
        self._codec = codec

    def render(self, batch: Batch) -> bytes:
        """The events of `batch`."""
        parts: list[bytes] = []
        for index, delta in batch:
            prefix = self._prefixes[index]
            if not self._role_sent[index]:
                self._role_sent[index] = True
                parts += (prefix, b'"role":"assistant","content":""', self._unfinished)
            if self._codec is not None and delta.logprobs:
                logprobs = _encode(chat_logprobs(self._codec, delta.logprobs))
                parts += (prefix, b'"content":', _encode(delta.text), b'},"logprobs":', logprobs)
                parts += (b',"finish_reason":null', self._templates.tail)
            elif delta.text:
                parts += (prefix, b'"content":', _encode(delta.text), self._unfinished)
            if delta.finish_reason is not None:
                parts += self._templates.finish(prefix, b"}", delta)
        return b"".join(parts)

    def last_chunk(self, usage: Usage | None, timing: RouteTiming | None) -> bytes:
        """See `ChunkStream.last_chunk`."""
        return self._templates.last_chunk(usage, timing)


class CompletionStream:
    """Chunks of a text completion: per choice the echoed prompt, those with text, and one with the finish reason.

    Args:
        echoes: per choice what comes before the first token; empty strings where nothing is echoed.
        num_logprobs: most likely tokens per place; None without logprobs.
        with_token_ids: whether chunks say which tokens they stand for; then also those without text are sent.
    """

    def __init__(
        self,
        response_id: str,
        created: int,
        model: str,
        echoes: Sequence[str],
        *,
        include_usage: bool,
        codec: TextCodec,
        num_logprobs: int | None = None,
        with_token_ids: bool = False,
    ) -> None:
        self._templates = _Templates(response_id, "text_completion", created, model, include_usage)
        self._prefixes = [b'%s{"index":%d,"text":' % (self._templates.head, index) for index in range(len(echoes))]
        self._unfinished = b',"logprobs":null,"finish_reason":null' + self._templates.tail
        self._echoes = list(echoes)
        self._num_logprobs = num_logprobs
        self._with_token_ids = with_token_ids
        self._logprobs = [LegacyLogprobs(codec) for _ in echoes]

    def render(self, batch: Batch) -> bytes:
        """The events of `batch`."""
        parts: list[bytes] = []
        for index, delta in batch:
            prefix = self._prefixes[index]
            if self._echoes[index]:
                parts += (prefix, _encode(self._echoes[index]), self._unfinished)
                self._echoes[index] = ""
            token_ids = (b',"token_ids":', _encode(delta.token_ids)) if self._with_token_ids and delta.token_ids else ()
            if self._num_logprobs is not None and delta.logprobs:
                logprobs = self._encoded_logprobs(index, delta)
                parts += (prefix, _encode(delta.text), *token_ids, b',"logprobs":', logprobs)
                parts += (b',"finish_reason":null', self._templates.tail)
            elif delta.text or token_ids:
                parts += (prefix, _encode(delta.text), *token_ids, self._unfinished)
            if delta.finish_reason is not None:
                parts += self._templates.finish(prefix, b'""', delta)
        return b"".join(parts)

    def last_chunk(self, usage: Usage | None, timing: RouteTiming | None) -> bytes:
        """See `ChunkStream.last_chunk`."""
        return self._templates.last_chunk(usage, timing)

    def _encoded_logprobs(self, index: int, delta: OutputDelta) -> bytes:
        assert delta.logprobs is not None and self._num_logprobs is not None
        return _encode(self._logprobs[index].entries(delta.logprobs, self._num_logprobs))
