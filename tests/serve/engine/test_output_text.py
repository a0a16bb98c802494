from dataclasses import replace
from typing import Any

import pytest

from dynamo.serve.engine.output_text import OutputText
from dynamo.serve.engine.request import GenerationRequest, SamplingParams
from dynamo.serve.errors import RequestFailedError

EOS = 257
REPLY = list("né, the end.".encode())


class Bytes:
    """Tokens are bytes; those from 256 on are special."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256


def request(max_tokens: int = 50, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id="r", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=max_tokens, **sampling)
    )


def text_of(asked: GenerationRequest, max_model_len: int = 100) -> OutputText:
    return OutputText(asked, Bytes(), eos_token_ids=frozenset([EOS]), max_model_len=max_model_len)


def pushed(text: OutputText, token_ids: list[int]) -> tuple[str, Any, Any, int]:
    """All that is certain, how it ended, and after how many tokens."""
    parts = ""
    for number, token_id in enumerate(token_ids, 1):
        part, finish, stop = text.push(token_id)
        parts += part
        if finish is not None:
            return parts, finish, stop, number
    return parts, None, None, len(token_ids)


@pytest.mark.parametrize(
    ("sampling", "ended"),
    [
        ({}, ("né, the end.", "stop", None, 14)),
        ({"stop_token_ids": frozenset([EOS])}, ("né, the end.", "stop", EOS, 14)),
        ({"ignore_eos": True}, ("né, the end.", None, None, 14)),
        ({"max_tokens": 2}, ("n\ufffd", "length", None, 2)),
        ({"stop": ("the",)}, ("né, ", "stop", "the", 8)),
        ({"stop": ("the",), "min_tokens": 9}, ("né, the end.", "stop", None, 14)),
        ({"min_tokens": 20}, ("né, the end.", None, None, 14)),
    ],
)
@pytest.mark.parametrize("num_before", [0, 1, 2, 7])
def test_a_text_ends_where_it_should_wherever_it_was_begun(
    sampling: dict[str, Any], ended: tuple[str, Any, Any, int], num_before: int
) -> None:
    text, finish, stop, num_tokens = ended
    num_before = min(num_before, num_tokens - 1)
    asked = request(**sampling)
    before, *_ = pushed(text_of(asked), REPLY[:num_before])
    going_on = text_of(replace(asked, output_token_ids=REPLY[:num_before]))
    after = pushed(going_on, [*REPLY, EOS][num_before:])
    assert (before + after[0], *after[1:3], after[3] + num_before) == (text, finish, stop, num_tokens)


def test_what_is_held_back_is_given_in_the_end() -> None:
    text = text_of(request(stop=("end!",)))
    assert pushed(text, REPLY[:-1])[0] == "né, the "
    assert text.finish() == "end"


def test_the_context_ends_a_text_as_well() -> None:
    assert pushed(text_of(request(), max_model_len=5), REPLY)[1:] == ("length", None, 3)


def test_a_request_that_had_ended_cannot_go_on() -> None:
    with pytest.raises(RequestFailedError, match="ended with output token 3 of the 5"):
        text_of(replace(request(3), output_token_ids=REPLY[:5]))
