from typing import Any

import pytest

from dynamo.serve.errors import RequestError
from dynamo.serve.openai import MessageParam, TextPart
from dynamo.serve.prompt import chat_prompt, completion_prompts


async def prompts_of(codec: Any, prompt: Any) -> list[list[int]]:
    return await completion_prompts(codec, prompt)


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
    token_ids = run(chat_prompt(codec, [MessageParam(role="user", content=parts)]))
    assert codec.decode(token_ids) == "user: one\ntwo\n"


def test_a_refusal_of_the_template_names_the_messages(run: Any, codec: Any) -> None:
    class Picky(type(codec)):  # type: ignore[misc]
        def apply_chat_template(self, messages: Any) -> list[int]:
            raise RequestError("roles must alternate")

    with pytest.raises(RequestError, match="roles must alternate") as caught:
        run(chat_prompt(Picky(), [MessageParam(role="user", content="x")]))
    assert caught.value.param == "messages"


def test_developer_messages_reach_the_template_as_system_messages(run: Any, codec: Any) -> None:
    token_ids = run(chat_prompt(codec, [MessageParam(role="developer", content="be brief")]))
    assert codec.decode(token_ids) == "system: be brief\n"
