import json
from typing import Any

import pytest

from dynamo.serve.engine.request import OutputDelta, TokenLogprob
from dynamo.serve.errors import RequestError
from dynamo.serve.openai import PromptTokensDetails, Usage
from dynamo.serve.stream import ChatStream, CompletionStream, error_event


def events(body: bytes) -> list[Any]:
    assert body == b"" or body.endswith(b"\n\n")
    parts = body.decode().split("\n\n")[:-1]
    assert all(part.startswith("data: ") for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def chat_stream(num_choices: int = 1, **options: Any) -> ChatStream:
    return ChatStream(
        "chatcmpl-1", 17, 'a "model"', num_choices, include_usage=options.pop("include_usage", False), **options
    )


def test_a_chat_begins_with_the_role_and_ends_with_one_terminal_chunk() -> None:
    stream = chat_stream()
    chunks = events(stream.render([(0, OutputDelta(text="Hi", token_ids=[1]))]))
    chunks += events(stream.render([(0, OutputDelta(text="!", token_ids=[2], finish_reason="stop"))]))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hi"},
        {"content": "!"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in chunks} == {
        ("chatcmpl-1", "chat.completion.chunk", 17, 'a "model"')
    }
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("stop_reason", [None, 'say "when"', 257])
def test_the_last_chunk_names_the_stop_that_ended_the_text(codec: Any, stop_reason: str | int | None) -> None:
    last = OutputDelta(text="!", token_ids=[2], finish_reason="stop", stop_reason=stop_reason)
    for stream in (chat_stream(), completion_stream(codec)):
        *_, chunk = events(stream.render([(0, last)]))
        assert chunk["choices"][0]["finish_reason"] == "stop"
        assert chunk["choices"][0]["stop_reason"] == stop_reason


def test_usage_is_null_before_the_chunk_that_has_it() -> None:
    stream = chat_stream(include_usage=True)
    chunks = events(stream.render([(0, OutputDelta(text="Hi", token_ids=[1], finish_reason="length"))]))
    assert all(chunk["usage"] is None for chunk in chunks)
    (last,) = events(stream.last_chunk(Usage(3, 1, 4, PromptTokensDetails(2)), None))
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_held_back_text_makes_no_event() -> None:
    stream = chat_stream()
    events(stream.render([(0, OutputDelta(text="a", token_ids=[1]))]))
    assert stream.render([(0, OutputDelta(text="", token_ids=[2, 3]))]) == b""


def test_text_survives_json() -> None:
    text = 'quote " backslash \\ newline \n tab \t nul \x00 é 漢 🎉 \u2028 </script>'
    chunks = events(chat_stream().render([(0, OutputDelta(text=text, token_ids=[1]))]))
    assert chunks[1]["choices"][0]["delta"]["content"] == text


def test_choices_of_one_step_share_a_write_and_keep_their_indices() -> None:
    stream = chat_stream(3)
    chunks = events(
        stream.render([(2, OutputDelta(text="c", token_ids=[1])), (0, OutputDelta(text="a", token_ids=[1]))])
    )
    seen = [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"]) for chunk in chunks]
    role = {"role": "assistant", "content": ""}
    assert seen == [(2, role), (2, {"content": "c"}), (0, role), (0, {"content": "a"})]


def test_chat_logprobs_have_one_entry_per_token_even_without_text(codec: Any) -> None:
    stream = chat_stream(codec=codec)
    logprobs = [TokenLogprob(0xC3, -0.5, ((0xC3, -0.5), (65, float("-inf")))), TokenLogprob(0xA9, -0.25, ())]
    first = events(stream.render([(0, OutputDelta(text="", token_ids=[0xC3], logprobs=logprobs[:1]))]))
    second = events(stream.render([(0, OutputDelta(text="é", token_ids=[0xA9], logprobs=logprobs[1:]))]))
    (entry,) = first[1]["choices"][0]["logprobs"]["content"]
    assert entry == {
        "token": "�",
        "logprob": -0.5,
        "bytes": [0xC3],
        "top_logprobs": [
            {"token": "�", "logprob": -0.5, "bytes": [0xC3]},
            {"token": "A", "logprob": -9999.0, "bytes": [65]},
        ],
    }
    assert second[0]["choices"][0]["delta"] == {"content": "é"}
    assert len(second[0]["choices"][0]["logprobs"]["content"]) == 1


def completion_stream(codec: Any, echoes: tuple[str, ...] = ("",), num_logprobs: int | None = None) -> CompletionStream:
    return CompletionStream("cmpl-1", 17, "m", echoes, include_usage=False, codec=codec, num_logprobs=num_logprobs)


def test_a_completion_echoes_each_prompt_once_and_ends_with_one_terminal_chunk(codec: Any) -> None:
    stream = completion_stream(codec, ("one", "two"))
    chunks = events(stream.render([(1, OutputDelta(text="b", token_ids=[1], finish_reason="stop"))]))
    chunks += events(stream.render([(0, OutputDelta(text="a", token_ids=[1]))]))
    chunks += events(stream.render([(0, OutputDelta(finish_reason="length"))]))
    choices = [(c["choices"][0]["index"], c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in chunks]
    assert choices == [
        (1, "two", None),
        (1, "b", None),
        (1, "", "stop"),
        (0, "one", None),
        (0, "a", None),
        (0, "", "length"),
    ]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_completion_offsets_run_on_over_deltas_and_count_whole_characters(codec: Any) -> None:
    stream = completion_stream(codec, num_logprobs=2)
    offsets: list[int] = []
    for byte in "aé漢b".encode():
        (chunk,) = events(
            stream.render([(0, OutputDelta(token_ids=[byte], logprobs=[TokenLogprob(byte, -1.0, ((66, -2.0),))]))])
        )
        logprobs = chunk["choices"][0]["logprobs"]
        assert {len(values) for values in logprobs.values()} == {1}
        assert len(logprobs["top_logprobs"][0]) == 2
        offsets += logprobs["text_offset"]
    assert offsets == [0, 1, 1, 2, 2, 2, 3]


def test_an_error_is_one_event_in_the_envelope() -> None:
    (event,) = events(error_event(RequestError("went wrong", status=500, type="server_error", code="request_failed")))
    assert event == {
        "error": {"message": "went wrong", "type": "server_error", "param": None, "code": "request_failed"}
    }
