"""Bodies of the admin endpoints, checked as strictly as OpenAI's: unknown fields are refused, numbers have ranges."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from dynamo.serve.openai import Label, MessageParam, TokenId

__all__ = [
    "DEFAULT_PREFETCH_S",
    "DEFAULT_TTL_S",
    "DEFAULT_VERIFY_S",
    "ClearAnswer",
    "ClearRequest",
    "ExplainRequest",
    "ExtendPinAnswer",
    "ExtendPinRequest",
    "LookupRequest",
    "PinAnswer",
    "PinRequest",
    "PrefetchAnswer",
    "PrefetchRequest",
    "PromptFields",
    "ResizeAnswer",
    "ResizeRequest",
    "UnpinAnswer",
    "VerifyRequest",
]

DEFAULT_PREFETCH_S = 30.0
DEFAULT_VERIFY_S = 60.0
DEFAULT_TTL_S = 600.0

Seconds = Annotated[float, Meta(gt=0, le=3600)]
TimeToLive = Annotated[
    float, Meta(gt=0, le=30 * 86400, description="Seconds from now after which the pin ends by itself.")
]


class PromptFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """Whose blocks are meant: those of exactly one of `prompt` and `messages`, as the generating endpoints hash them."""

    prompt: Annotated[str | list[TokenId], Meta(description="Text or token ids, as for /v1/completions.")] | None = None
    messages: (
        Annotated[list[MessageParam], Meta(min_length=1, description="A conversation, as for /v1/chat/completions.")]
        | None
    ) = None
    cache_salt: Annotated[Label, Meta(description="The salt that requests of this tenant send.")] | None = None


class LookupRequest(PromptFields, kw_only=True):
    """Body of POST /admin/cache/lookup."""


class PrefetchRequest(PromptFields, kw_only=True):
    """Body of POST /admin/cache/prefetch."""

    timeout_s: Annotated[Seconds, Meta(description="How long to wait for the loads; 30 by default.")] | None = None


class PinRequest(PromptFields, kw_only=True):
    """Body of POST /admin/cache/pins."""

    tiers: (
        Annotated[
            list[Literal["device", "host", "disk"]],
            Meta(min_length=1, max_length=3, description="Where to pin; host and disk by default."),
        ]
        | None
    ) = None
    ttl_s: TimeToLive | None = None
    name: Annotated[Label, Meta(description="What the list of pins calls it.")] | None = None


class ExtendPinRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /admin/cache/pins/{pin_id}."""

    ttl_s: TimeToLive


class ClearRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /admin/cache/clear."""

    tier: Literal["device", "host", "disk", "all"]


class ResizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /admin/cache/resize."""

    tier: Literal["host", "disk"]
    size: (
        Annotated[str, Meta(min_length=1, max_length=64, description='Such as "8GiB", or a number of bytes.')]
        | Annotated[int, Meta(ge=0, le=2**60)]
    )


class VerifyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /admin/cache/verify."""

    timeout_s: Annotated[Seconds, Meta(description="The longest it may take; 60 by default.")] | None = None


class ExplainRequest(PromptFields, kw_only=True):
    """Body of POST /admin/cache/explain: `key`, or a prompt, of which the first block that is not cached is explained."""

    key: (
        Annotated[
            str,
            Meta(
                pattern="^[0-9a-fA-F]{32}$",
                min_length=32,
                max_length=32,
                description="A block's key as 32 hexadecimal digits.",
            ),
        ]
        | None
    ) = None


class PrefetchAnswer(Struct):
    """How many leading tokens lie in device memory now."""

    device_tokens: int


class PinAnswer(Struct):
    """A pin, which DELETE /admin/cache/pins/{pin_id} ends before its time."""

    pin_id: str
    blocks: dict[str, int]
    num_tokens: int
    ttl_s: float


class ExtendPinAnswer(Struct):
    """The pin ends by itself `ttl_s` seconds from now, whatever it had left."""

    pin_id: str
    ttl_s: float


class UnpinAnswer(Struct):
    """The pin has ended."""

    pin_id: str


class ClearAnswer(Struct):
    """Blocks in each tier afterwards: those that were in use."""

    cached_blocks: dict[str, int]


class ResizeAnswer(Struct):
    """The tier's slots from now on, their bytes, and what keeps it from filling them, such as a disk that is too small."""

    num_slots: int
    num_bytes: int
    warning: str | None = None
