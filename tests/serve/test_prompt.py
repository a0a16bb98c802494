from typing import Any

import pytest

from dynamo.serve.errors import RequestError
from dynamo.serve.openai import MessageParam, TextPart
from dynamo.serve.prompt import chat_prompt, completion_prompts


async def prompts_of(codec: Any, prompt: Any) -> list[list[int]]:
    return await completion_prompts(codec, prompt, 512)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 257], [[97, 257]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ("é" * 5000, [list("é".encode()) * 5000]),
    ],
)
def test_prompts_come_in_four_forms(run: Any, codec: Any, prompt: Any, expected: list[list[int]]) -> None:
    assert run(prompts_of(codec, prompt)) == expected


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([], "empty list"),
        (["a", ""], "prompt 1 is empty"),
        ([[1], []], "prompt 1 has no tokens"),
        (["a", 1], "mixes"),
        (["a", [1]], "mixes"),
        ([1, [1]], "mixes"),
        ([258], "0 to 257"),
        ([-1], "0 to 257"),
        ([10**30], "0 to 257"),
        ([[1], [1, 258]], "0 to 257"),
        (["a"] * 257, "at most 256"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused(run: Any, codec: Any, prompt: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        run(prompts_of(codec, prompt))
    assert caught.value.param == "prompt"


def test_text_parts_are_joined_by_line_breaks(run: Any, codec: Any) -> None:
    parts = [TextPart("text", "one"), TextPart("text", "two")]
    token_ids = run(chat_prompt(codec, [MessageParam(role="user", content=parts)], 512))
    assert codec.decode(token_ids) == "user: one\ntwo\n"


def test_a_refusal_of_the_template_names_the_messages(run: Any, codec: Any) -> None:
    class Picky(type(codec)):  # type: ignore[misc]
        def apply_chat_template(self, messages: Any, *, max_tokens: int) -> list[int]:
            raise RequestError("roles must alternate")

    with pytest.raises(RequestError, match="roles must alternate") as caught:
        run(chat_prompt(Picky(), [MessageParam(role="user", content="x")], 512))
    assert caught.value.param == "messages"


def test_developer_messages_reach_the_template_as_system_messages(run: Any, codec: Any) -> None:
    token_ids = run(chat_prompt(codec, [MessageParam(role="developer", content="be brief")], 512))
    assert codec.decode(token_ids) == "system: be brief\n"


@pytest.mark.parametrize("size", [1, 5000])
def test_the_codec_learns_how_many_tokens_a_prompt_may_have(run: Any, codec: Any, size: int) -> None:
    class Short(type(codec)):  # type: ignore[misc]
        def encode(self, text: str, *, max_tokens: int) -> list[int]:
            raise RequestError(f"at most {max_tokens}", code="context_length_exceeded")

        def apply_chat_template(self, messages: Any, *, max_tokens: int) -> list[int]:
            return self.encode("", max_tokens=max_tokens)

    for work in (
        completion_prompts(Short(), "x" * size, 512),
        chat_prompt(Short(), [MessageParam(role="user", content="x" * size)], 512),
    ):
        with pytest.raises(RequestError, match="at most 512") as caught:
            run(work)
        assert caught.value.param in ("prompt", "messages")
