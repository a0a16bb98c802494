"""OpenAI's request and response bodies, as far as this server speaks them.

A field typed `Unsupported` is one OpenAI knows and this server does not: it is refused by name unless it is null, so that
nothing a client asks for is silently ignored. Fields that are in neither list are refused as unknown.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from dynamo.serve.engine.request import FinishReason

__all__ = [
    "MAX_CHOICES",
    "MAX_PRIORITY",
    "ChatChoice",
    "ChatCompletion",
    "ChatCompletionRequest",
    "ChatLogprobs",
    "ChatMessage",
    "ChatTokenLogprob",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionRequest",
    "DynamoFields",
    "ErrorBody",
    "ErrorEnvelope",
    "Label",
    "MessageParam",
    "ModelCard",
    "ModelList",
    "PromptTokensDetails",
    "ResponseFormat",
    "RouteTiming",
    "SamplingFields",
    "StreamOptions",
    "TextPart",
    "TokenId",
    "TopLogprob",
    "Usage",
]

MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_PRIORITY = 100

Unsupported = Annotated[None, Meta(description="Not supported: refused unless null.")]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopReason = Annotated[
    str | int | None, Meta(description="As at vLLM: the stop string or stop token id that ended the text, if one did.")
]
Label = Annotated[str, Meta(max_length=512)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Options of a stream; only together with `stream: true`."""

    include_usage: Annotated[bool, Meta(description="Send one more chunk with the usage before [DONE].")] | None = None
    include_obfuscation: Annotated[bool, Meta(description="Only false: chunks are not padded.")] | None = None


class TextPart(Struct, forbid_unknown_fields=True):
    """The one kind of content part that is supported."""

    type: Literal["text"]
    text: str


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """Only plain text; JSON modes are refused."""

    type: Literal["text"]


class MessageParam(Struct, forbid_unknown_fields=True, kw_only=True):
    """One message of the conversation so far. Several text parts are joined by a line break."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    refusal: Unsupported = None
    annotations: Unsupported = None


WorkerName = Annotated[str, Meta(min_length=1, max_length=256)]


class DynamoFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """Where a request is served, and whether the answer says so; each field has a header of its own, `x-dynamo-…`."""

    worker: Annotated[WorkerName, Meta(description="Only this worker; without it, the router chooses.")] | None = None
    exclude: Annotated[list[WorkerName], Meta(max_length=64, description="None of these workers.")] | None = None
    session: (
        Annotated[
            str,
            Meta(
                min_length=1, max_length=256, description="Requests of one session prefer the worker they had before."
            ),
        ]
        | None
    ) = None
    priority: (
        Annotated[
            int,
            Meta(
                ge=-MAX_PRIORITY,
                le=MAX_PRIORITY,
                description="Higher goes first where requests wait for a worker; 0 is usual.",
            ),
        ]
        | None
    ) = None
    timing: Annotated[bool, Meta(description="The answer, or a stream's last chunk, has a `dynamo` object.")] | None = (
        None
    )


class SamplingFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both generating endpoints accept. A field that is null or absent takes the model folder's or OpenAI's default."""

    model: Annotated[str, Meta(description="A name from /v1/models.")]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_tokens: (
        Annotated[int, Meta(ge=0, le=2**31 - 1, description="No end of sequence and no stop before this many tokens.")]
        | None
    ) = None
    temperature: Annotated[float, Meta(ge=0, le=2, description="0 is greedy.")] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1, description="0 and -1 keep all tokens.")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10, description="1 is none.")] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES, description="Choices per prompt.")] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    ignore_eos: Annotated[bool, Meta(description="Do not end at the model's end-of-sequence tokens.")] | None = None
    user: Label | None = None
    cache_salt: Annotated[Label, Meta(description="KV blocks are shared only among requests of equal salt.")] | None = (
        None
    )
    logit_bias: Annotated[dict[str, None], Meta(max_length=0, description="Only {}.")] | None = None
    metadata: Unsupported = None
    service_tier: Annotated[Literal["auto", "default"], Meta(description="Both mean the same.")] | None = None
    dynamo: DynamoFields | None = None


class ChatCompletionRequest(SamplingFields, kw_only=True):
    """Body of POST /v1/chat/completions. Without a limit, a reply may fill the rest of the context."""

    messages: Annotated[list[MessageParam], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    store: Annotated[bool, Meta(description="Only false: nothing is stored.")] | None = None
    safety_identifier: Label | None = None
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    parallel_tool_calls: Annotated[bool, Meta(description="Changes nothing: there are no tools.")] | None = None
    prediction: Unsupported = None
    prompt_cache_key: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    tool_choice: Annotated[Literal["none", "auto"], Meta(description="Both mean none: there are no tools.")] | None = (
        None
    )
    tools: Annotated[list[None], Meta(max_length=0, description="Only an empty list.")] | None = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


class CompletionRequest(SamplingFields, kw_only=True):
    """Body of POST /v1/completions. Without a limit, 16 tokens are generated, as at OpenAI."""

    prompt: (
        str
        | Annotated[
            list[int | str | list[int]],
            Meta(description="A list of texts, one prompt's token ids, or a list of such lists; never a mixture."),
        ]
    )
    echo: Annotated[bool, Meta(description="Put the prompt's text before the completion.")] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES, description="Must equal n.")] | None = None
    return_token_ids: (
        Annotated[bool, Meta(description="As at vLLM: each choice has `token_ids`, in a stream those of its chunk.")]
        | None
    ) = None
    suffix: Unsupported = None


class PromptTokensDetails(Struct):
    """How much of the prompt was not computed."""

    cached_tokens: int


class Usage(Struct):
    """Tokens of one HTTP request; each prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class RouteTiming(Struct, kw_only=True, omit_defaults=True):
    """Where a request was served and how long that took; of the first choice, and in `choices` of all where there are more.

    A server without workers has no `worker_id`, no `predicted_cached_tokens`, no `queue_ms` and no `route_us`.
    """

    worker_id: Annotated[str, Meta(description="Who served it, or did last.")] | None = None
    attempts: Annotated[int, Meta(description="More than 1: it was carried on at another worker.")] | None = None
    cached_tokens: int
    predicted_cached_tokens: int | None = None
    queue_ms: Annotated[float, Meta(description="How long it waited for a worker.")] | None = None
    route_us: Annotated[float, Meta(description="How long the choice of the worker took.")] | None = None
    ttft_ms: Annotated[float, Meta(description="From the request's arrival to its first token.")] | None = None
    total_ms: float
    choices: "list[RouteTiming] | None" = None


class TopLogprob(Struct):
    """One of the most likely tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct):
    """One generated token, and the most likely ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """One entry per generated token."""

    content: list[ChatTokenLogprob]


class CompletionLogprobs(Struct):
    """Four parallel lists with one entry per generated token; offsets count characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatMessage(Struct):
    """A whole reply."""

    role: Literal["assistant"]
    content: str
    refusal: str | None = None


class ChatChoice(Struct):
    """One reply of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason


class ChatCompletion(Struct):
    """Answer of POST /v1/chat/completions without stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    dynamo: RouteTiming | UnsetType = UNSET


class CompletionChoice(Struct):
    """One text of a completion; index is prompt * n + choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason
    token_ids: list[int] | UnsetType = UNSET


class Completion(Struct):
    """Answer of POST /v1/completions without stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    dynamo: RouteTiming | UnsetType = UNSET


class ModelCard(Struct):
    """One served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Struct):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorBody(Struct):
    """What went wrong; `message` is for people, `code` for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Struct):
    """The body of every answer that is not 2xx, and of an error event in a stream."""

    error: ErrorBody
