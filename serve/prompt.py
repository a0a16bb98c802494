"""From messages and prompts to token ids."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool

from dynamo.serve.errors import RequestError
from dynamo.serve.openai import MessageParam

__all__ = ["MAX_SEQUENCES", "TextCodec", "chat_prompt", "completion_prompts"]

MAX_SEQUENCES = 256
"""Most sequences (prompts times choices) of one request."""

# Below this many characters encoding takes well under a millisecond; above, it must not hold up everybody's streams.
_INLINE_CHARS = 4096


class TextCodec(Protocol):
    """What the front needs of `dynamo.serve.engine.tokenizer.Tokenizer`; called from several threads at once.

    `encode` and `apply_chat_template` raise RequestError for text and messages the model cannot take; what cannot fit
    into `max_tokens` they refuse unencoded.
    """

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, max_tokens: int) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_special(self, token_id: int) -> bool: ...

    def apply_chat_template(self, messages: list[dict[str, Any]], *, max_tokens: int) -> list[int]: ...


async def chat_prompt(codec: TextCodec, messages: Sequence[MessageParam], max_model_len: int) -> list[int]:
    """Token ids of a conversation under the model's chat template.

    Raises:
        RequestError: the template refuses the conversation, nothing is left of it, or it is far beyond the context.
    """
    # Models know the developer's role under its older name.
    plain = [
        {"role": "system" if message.role == "developer" else message.role, "content": _message_text(message)}
        for message in messages
    ]
    num_chars = sum(len(message["content"]) for message in plain)
    with _naming("messages"):
        if num_chars <= _INLINE_CHARS:
            token_ids = codec.apply_chat_template(plain, max_tokens=max_model_len)
        else:
            token_ids = await run_in_threadpool(codec.apply_chat_template, plain, max_tokens=max_model_len)
    if not token_ids:
        raise RequestError("the messages give an empty prompt; send some text", param="messages", code="invalid_value")
    return token_ids


async def completion_prompts(
    codec: TextCodec, prompt: str | list[int | str | list[int]], max_model_len: int
) -> list[list[int]]:
    """Token ids of each prompt of a completion request.

    Raises:
        RequestError: a prompt is empty or far beyond the context, the list mixes kinds, is too long, or has token ids
            the model does not know.
    """
    texts: list[str] = []
    id_lists: list[list[int]] = []
    if isinstance(prompt, str):
        texts = [prompt]
    elif not prompt:
        raise _wrong_prompt("prompt is an empty list; send text or token ids")
    elif all(isinstance(entry, int) for entry in prompt):
        id_lists = [[entry for entry in prompt if isinstance(entry, int)]]
    else:
        texts = [entry for entry in prompt if isinstance(entry, str)]
        id_lists = [entry for entry in prompt if isinstance(entry, list)]
        if len(prompt) not in (len(texts), len(id_lists)):
            raise _wrong_prompt(
                "prompt mixes kinds; send text, a list of texts, token ids, or a list of lists of token ids"
            )
        if len(prompt) > MAX_SEQUENCES:
            raise _wrong_prompt(f"prompt has {len(prompt)} entries; accepted are at most {MAX_SEQUENCES}")
    for token_ids in id_lists:
        _check_token_ids(token_ids, codec.vocab_size)
    if texts:
        if not all(texts):
            raise _wrong_prompt(f"prompt {texts.index('')} is empty; send at least one character")
        with _naming("prompt"):
            id_lists = await _encoded(codec, texts, max_model_len)
    if not all(id_lists):
        raise _wrong_prompt(f"prompt {id_lists.index([])} has no tokens; send at least one")
    return id_lists


async def _encoded(codec: TextCodec, texts: list[str], max_tokens: int) -> list[list[int]]:
    def encode_all() -> list[list[int]]:
        return [codec.encode(text, max_tokens=max_tokens) for text in texts]

    if sum(map(len, texts)) <= _INLINE_CHARS:
        return encode_all()
    return await run_in_threadpool(encode_all)


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Adds the request's field to refusals of the tokenizer, which does not know it."""
    try:
        yield
    except RequestError as error:
        error.param = error.param or param
        raise


def _check_token_ids(token_ids: list[int], vocab_size: int) -> None:
    if not token_ids:
        return
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise _wrong_prompt(f"prompt has token id {token_id}; the model's are 0 to {vocab_size - 1}")


def _message_text(message: MessageParam) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)


def _wrong_prompt(message: str) -> RequestError:
    return RequestError(message, param="prompt", code="invalid_value")
