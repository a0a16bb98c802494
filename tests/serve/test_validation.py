import json
from typing import Any

import pytest

from dynamo.serve.errors import RequestError
from dynamo.serve.openai import ChatCompletionRequest, CompletionRequest
from dynamo.serve.validation import RequestDecoder

CHAT = RequestDecoder(ChatCompletionRequest)
COMPLETION = RequestDecoder(CompletionRequest)
MESSAGES = [{"role": "user", "content": "hi"}]


def refusal(decoder: RequestDecoder[Any], body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decoder.decode(body)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi", **fields}).encode()


def test_everything_supported_is_accepted() -> None:
    request = CHAT.decode(
        chat(
            stream=True,
            stream_options={"include_usage": True},
            max_completion_tokens=5,
            temperature=0,
            top_p=1,
            top_k=-1,
            min_p=0.5,
            n=16,
            presence_penalty=-2,
            frequency_penalty=2,
            repetition_penalty=1.5,
            seed=-1,
            stop=["a"] * 16,
            stop_token_ids=[0, 1],
            min_tokens=1,
            ignore_eos=True,
            logprobs=True,
            top_logprobs=20,
            user="someone",
            cache_salt="tenant",
            response_format={"type": "text"},
            modalities=["text"],
            store=False,
        )
    )
    assert request.n == 16
    assert request.stream_options is not None and request.stream_options.include_usage


def test_null_means_not_given() -> None:
    request = CHAT.decode(chat(tools=None, temperature=None, stop=None, n=None, response_format=None))
    assert request.temperature is None


@pytest.mark.parametrize(
    "field",
    [
        "functions",
        "function_call",
        "audio",
        "prediction",
        "reasoning_effort",
        "web_search_options",
        "metadata",
        "verbosity",
        "prompt_cache_key",
    ],
)
def test_known_but_unsupported_parameters_are_refused_by_name(field: str) -> None:
    for value in ("x", 1, {}, [], True):
        error = refusal(CHAT, chat(**{field: value}))
        assert (error.param, error.code) == (field, "unsupported_parameter")
        assert field in error.message


@pytest.mark.parametrize(
    ("field", "harmless", "refused"),
    [
        ("tools", [[]], [[{"type": "function"}], [None], {}, "x", True]),
        ("tool_choice", ["none", "auto"], ["required", {"type": "function"}, 1]),
        ("parallel_tool_calls", [True, False], ["x", 1, {}]),
        ("logit_bias", [{}], [{"5": 1}, {"5": None}, [], "x", 1]),
        ("service_tier", ["auto", "default"], ["flex", "priority", 1, {}]),
    ],
)
def test_of_what_is_not_supported_only_values_that_change_nothing_are_accepted(
    field: str, harmless: list[Any], refused: list[Any]
) -> None:
    for value in harmless:
        CHAT.decode(chat(**{field: value}))
    for value in refused:
        error = refusal(CHAT, chat(**{field: value}))
        assert (error.param, error.code) == (field, "unsupported_parameter")
        assert field in error.message


@pytest.mark.parametrize("value", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, {}, "text"])
def test_json_modes_are_refused(value: object) -> None:
    error = refusal(CHAT, chat(response_format=value))
    assert (error.param, error.code) == ("response_format", "unsupported_parameter")


def test_audio_output_is_refused() -> None:
    error = refusal(CHAT, chat(modalities=["text", "audio"]))
    assert (error.param, error.code) == ("modalities", "unsupported_parameter")


def test_suffix_is_refused_in_completions() -> None:
    assert refusal(COMPLETION, completion(suffix="x")).code == "unsupported_parameter"


@pytest.mark.parametrize("path", ["nonsense", "guided_json"])
def test_unknown_parameters_are_named(path: str) -> None:
    error = refusal(CHAT, chat(**{path: 1}))
    assert (error.param, error.code) == (path, "unknown_parameter")


def test_unknown_parameters_are_named_with_their_place() -> None:
    error = refusal(CHAT, chat(messages=[{"role": "user", "content": "hi", "mood": "good"}]))
    assert (error.param, error.code) == ("messages[0].mood", "unknown_parameter")


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("temperature", -0.1, "a number from 0 to 2"),
        ("temperature", 2.1, "a number from 0 to 2"),
        ("top_p", 0, "a number above 0 to 1"),
        ("n", 0, "an integer from 1 to 16"),
        ("n", 17, "an integer from 1 to 16"),
        ("n", 10**40, "an integer from 1 to 16"),
        ("top_k", -2, "an integer from -1 to"),
        ("presence_penalty", 2.5, "a number from -2 to 2"),
        ("top_logprobs", 21, "an integer from 0 to 20"),
        ("max_tokens", 0, "an integer from 1 to"),
        ("seed", 2**63, "an integer from -"),
    ],
)
def test_values_out_of_range_say_the_value_and_the_range(field: str, value: float, accepted: str) -> None:
    error = refusal(CHAT, chat(**{field: value}))
    assert (error.param, error.code) == (field, "invalid_value")
    assert accepted in error.message
    assert repr(value)[:20] in error.message


@pytest.mark.parametrize(
    ("field", "value"), [("n", "2"), ("temperature", "hot"), ("stream", 1), ("max_tokens", 1.5), ("stop", 3)]
)
def test_wrong_types_name_the_field(field: str, value: object) -> None:
    error = refusal(CHAT, chat(**{field: value}))
    assert (error.param, error.code) == (field, "invalid_type")
    assert repr(value) in error.message


def test_too_many_or_empty_stop_strings_are_refused() -> None:
    assert refusal(CHAT, chat(stop=["a"] * 17)).param == "stop"
    assert refusal(CHAT, chat(stop=["a", ""])).param == "stop[1]"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_content_parts_other_than_text_are_refused_by_name(kind: str) -> None:
    for part in ({"type": kind, kind: {}}, {kind: {}, "type": kind}):
        error = refusal(CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]))
        assert (error.param, error.code) == ("messages[0].content[1].type", "unsupported_parameter")
        assert kind in error.message


def test_messages_carrying_tool_results_are_refused() -> None:
    assert (
        refusal(CHAT, chat(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}])).param
        == "messages[0].role"
    )
    error = refusal(CHAT, chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]))
    assert (error.param, error.code) == ("messages[0].tool_calls", "unsupported_parameter")


@pytest.mark.parametrize(("decoder", "missing"), [(CHAT, "messages"), (COMPLETION, "prompt")])
def test_missing_parameters_are_named(decoder: RequestDecoder[Any], missing: str) -> None:
    error = refusal(decoder, b'{"model": "m"}')
    assert (error.param, error.code) == (missing, "missing_required_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"model": NaN}',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"model": "\\udc00\\ud800x"}',
        b'{"model": ' + b"[" * 100_000,
        b'{"model": "m", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "temperature": 1e999}',
        b'{"model": "m", "seed": 1' + b"0" * 5000 + b"}",
        b'{"a":' * 100_000,
    ],
)
def test_bodies_that_are_no_request_are_refused(body: bytes) -> None:
    for decoder in (CHAT, COMPLETION):
        error = refusal(decoder, body)
        assert len(error.message) < 1000
        error.message.encode()


def test_invalid_utf8_is_told_with_its_place_in_the_body() -> None:
    body = '{"model": "ü", "prompt": "a'.encode() + b'\xff"}'
    assert f"at byte {body.index(0xFF)}:" in refusal(COMPLETION, body).message
    assert "at byte" not in refusal(COMPLETION, b'{"model": "m", "prompt": "\\ud800"}').message
