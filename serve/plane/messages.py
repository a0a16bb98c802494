"""What front and worker say to each other in a session. Frames of msgpack arrays, the first element says which.

    front → worker   Hello, then Submit, Abort, Ping
    worker → front   Welcome, then Step, Failed, Report

Requests are known by a number that the front gives, from 0 on and never twice in a session. A request ends with the gain
that carries a finish reason, with Failed, or with Abort; what crosses an Abort on its way is dropped by the front.
"""

from array import array
from typing import Final, Literal

import msgspec
from msgspec import Struct

from dynamo.kvcache.hashing import pack_tokens
from dynamo.router.workers import LoadReport
from dynamo.serve.engine.request import (
    DeltaSink,
    FinishReason,
    GenerationRequest,
    OutputDelta,
    SamplingParams,
    TokenLogprob,
)

__all__ = [
    "PROTOCOL_VERSION",
    "Abort",
    "DownMessage",
    "Failed",
    "FailureKind",
    "Gain",
    "Hello",
    "Ping",
    "Report",
    "Step",
    "Submit",
    "UpMessage",
    "Welcome",
    "decode_down",
    "decode_up",
    "delta_of",
    "encode",
    "gain_of",
    "request_of",
    "submit_of",
]

PROTOCOL_VERSION: Final = 1
"""Front and worker refuse each other when theirs differ; it changes with every change of this module's messages."""

FailureKind = Literal["overloaded", "failed", "dead", "draining"]

LogprobTuple = tuple[int, float, tuple[tuple[int, float], ...]]


class Hello(Struct, array_like=True, tag=0, frozen=True, gc=False):
    """The front's first words: whom it believes to talk to.

    Attributes:
        protocol: the front's `PROTOCOL_VERSION`.
        front_id: unique name of this front.
        worker_id: whom it wants.
        epoch: and which incarnation of it.
    """

    protocol: int
    front_id: str
    worker_id: str
    epoch: int


class Submit(Struct, array_like=True, tag=1, frozen=True, gc=False):
    """A request. Token ids are bytes of little-endian u32."""

    number: int
    request_id: str
    prompt: bytes
    output: bytes
    sampling: SamplingParams
    cache_salt: str


class Abort(Struct, array_like=True, tag=2, frozen=True, gc=False):
    """Nobody wants the rest of a request. Harmless for one that has ended."""

    number: int


class Ping(Struct, array_like=True, tag=3, frozen=True, gc=False):
    """The front lives. Sent when it has had nothing else to say for a while."""


class Welcome(Struct, array_like=True, tag=0, frozen=True, gc=False):
    """The worker's first words: who it is."""

    protocol: int
    worker_id: str
    epoch: int


class Gain(Struct, array_like=True, frozen=True, gc=False):
    """What one request gained: an `OutputDelta` with the request's number."""

    number: int
    text: str
    token_ids: list[int]
    num_cached_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[LogprobTuple] | None = None


class Step(Struct, array_like=True, tag=1, frozen=True, gc=False):
    """What the requests of this session gained in an engine step, or in several where the session was slower."""

    gains: list[Gain]


class Failed(Struct, array_like=True, tag=2, frozen=True, gc=False):
    """A request ended without a finish reason. "draining": it can go on at another worker."""

    number: int
    kind: FailureKind
    message: str


class Report(Struct, array_like=True, tag=3, frozen=True, gc=False):
    """How the worker is. At least once a second, so that it is also the sign of life."""

    load: LoadReport
    is_draining: bool


UpMessage = Hello | Submit | Abort | Ping
DownMessage = Welcome | Step | Failed | Report

# What msgspec raises besides its own error: for text that is no UTF-8, and for nesting without end.
_UNREADABLE: Final = (UnicodeDecodeError, RecursionError)

_encoder = msgspec.msgpack.Encoder()
_up_decoder: msgspec.msgpack.Decoder[UpMessage] = msgspec.msgpack.Decoder(UpMessage)
_down_decoder: msgspec.msgpack.Decoder[DownMessage] = msgspec.msgpack.Decoder(DownMessage)


def encode(message: UpMessage | DownMessage) -> bytes:
    return _encoder.encode(message)


def decode_up(payload: bytes | memoryview) -> UpMessage:
    """What a front says.

    Raises:
        msgspec.DecodeError: it is none of these messages.
    """
    try:
        return _up_decoder.decode(payload)
    except _UNREADABLE as error:
        raise msgspec.DecodeError(str(error)) from None


def decode_down(payload: bytes | memoryview) -> DownMessage:
    """What a worker says.

    Raises:
        msgspec.DecodeError: it is none of these messages.
    """
    try:
        return _down_decoder.decode(payload)
    except _UNREADABLE as error:
        raise msgspec.DecodeError(str(error)) from None


def submit_of(number: int, request: GenerationRequest) -> Submit:
    """
    Raises:
        ValueError: a token id is no u32.
    """
    return Submit(
        number,
        request.request_id,
        pack_tokens(request.prompt_token_ids).tobytes(),
        pack_tokens(request.output_token_ids).tobytes(),
        request.sampling,
        request.cache_salt,
    )


def request_of(submit: Submit, request_id: str, sink: DeltaSink | None = None) -> GenerationRequest:
    """The request for the worker's engine, where it has an id of its own.

    Raises:
        ValueError: the token ids are cut off.
    """
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=_unpack_tokens(submit.prompt),
        sampling=submit.sampling,
        cache_salt=submit.cache_salt,
        output_token_ids=_unpack_tokens(submit.output),
        sink=sink,
    )


def gain_of(number: int, delta: OutputDelta) -> Gain:
    logprobs = delta.logprobs
    return Gain(
        number,
        delta.text,
        delta.token_ids,
        delta.num_cached_tokens,
        delta.finish_reason,
        delta.stop_reason,
        None if logprobs is None else [(entry.token_id, entry.logprob, entry.top) for entry in logprobs],
    )


def delta_of(gain: Gain) -> OutputDelta:
    logprobs = gain.logprobs
    return OutputDelta(
        gain.text,
        gain.token_ids,
        None if logprobs is None else [TokenLogprob(*entry) for entry in logprobs],
        gain.finish_reason,
        gain.stop_reason,
        gain.num_cached_tokens,
    )


def _unpack_tokens(packed: bytes) -> list[int]:
    return array("I", packed).tolist()
