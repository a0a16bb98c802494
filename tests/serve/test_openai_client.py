"""OpenAI's own Python client against the real server with the demo model."""

import json
from typing import Any

import httpx
import openai
import pytest

MESSAGES: Any = [{"role": "user", "content": "What does os.path.join do?"}]
PROMPT = "Return a list of the names of"


def client_of(server: Any, api_key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=api_key, max_retries=0, timeout=60)


@pytest.fixture
def client(live_server: Any) -> Any:
    with client_of(live_server) as opened:
        yield opened


def token_ids(count: int, start: int = 100) -> list[int]:
    return [start + number % 500 for number in range(count)]


@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_chat_stream_has_role_text_one_end_per_choice_usage_and_done(client: Any, num_choices: int) -> None:
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            max_tokens=24,
            n=num_choices,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *chunks, last = chunks
    assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in [*chunks, last]} == {
        (last.id, last.created, "demo", "chat.completion.chunk")
    }
    assert all(chunk.usage is None for chunk in chunks)
    for index in range(num_choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert [choice.delta.role for choice in own] == ["assistant", *[None] * (len(own) - 1)]
        assert [choice.finish_reason is not None for choice in own] == [*[False] * (len(own) - 1), True]
        assert own[-1].finish_reason in ("stop", "length")


def test_the_stream_closes_with_done_and_usage_comes_only_when_asked_for(live_server: Any) -> None:
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 4, "stream": True}
    answer = httpx.post(live_server.url + "/v1/chat/completions", json=body, timeout=60)
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)


def test_a_streamed_answer_equals_the_one_in_one_piece(client: Any) -> None:
    for temperature in (0.0, 1.0):
        request: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 40, "temperature": temperature, "seed": 11}
        whole = client.chat.completions.create(**request)
        whole = client.chat.completions.create(**request)  # again: now both find the same prefix in the cache
        *chunks, last = list(
            client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert last.usage == whole.usage


def test_characters_are_never_split_over_chunks(client: Any) -> None:
    # So hot that the demo model says bytes at random, many of which begin characters.
    request: Any = {"model": "demo", "prompt": "é漢🎉", "max_tokens": 200, "temperature": 2, "top_p": 1, "seed": 3}
    whole = client.completions.create(**request, extra_body={"ignore_eos": True, "repetition_penalty": 1})
    streamed = client.completions.create(
        **request, stream=True, extra_body={"ignore_eos": True, "repetition_penalty": 1}
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_a_reply_can_be_sent_back_as_the_client_gave_it(client: Any) -> None:
    first = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=5).choices[0].message
    messages = [
        {"role": "developer", "content": "Be brief."},
        *MESSAGES,
        first,
        {"role": "user", "content": "And join?"},
    ]
    assert client.chat.completions.create(model="demo", messages=messages, max_tokens=5).choices[0].message.content


def test_a_client_that_leaves_frees_its_sequences(client: Any, live_server: Any, eventually: Any) -> None:
    request: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 8000, "n": 3, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**request, stream=True) as stream:
        next(iter(stream))
    gauges = ("dynamo_engine_running_sequences 0.0", "dynamo_kvcache_open_sequences 0.0", "dynamo_active_requests 0.0")
    eventually(lambda: all(gauge in httpx.get(live_server.url + "/metrics").text for gauge in gauges))


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        (
            {"messages": [{"role": "user", "content": "word " * 20_000}]},
            openai.BadRequestError,
            "context_length_exceeded",
            "messages",
        ),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "unknown_parameter", "nonsense"),
        (
            {"tools": [{"type": "function", "function": {"name": "x"}}]},
            openai.BadRequestError,
            "unsupported_parameter",
            "tools",
        ),
        ({"tool_choice": "required"}, openai.BadRequestError, "unsupported_parameter", "tool_choice"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "unsupported_parameter", "logit_bias"),
        (
            {"response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "unsupported_parameter",
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
            openai.BadRequestError,
            "unsupported_parameter",
            "response_format",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_raises_errors_with_code_param_and_type(
    client: Any, fields: dict[str, Any], error: type[openai.APIStatusError], code: str, param: str, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "demo", "messages": MESSAGES, "stream": stream, **fields})
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")  # type: ignore[attr-defined]


def test_the_client_raises_the_right_class_for_every_status(serve: Any, scripted: Any) -> None:
    def call(server: Any, api_key: str = "any", **fields: Any) -> None:
        with client_of(server, api_key) as opened:
            opened.chat.completions.create(**{"model": "scripted", "messages": MESSAGES, **fields})

    guarded = serve(api_key="right", max_body_bytes=1000)
    call(guarded, "right")
    with pytest.raises(openai.AuthenticationError) as unauthorized:
        call(guarded, "wrong")
    assert unauthorized.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError) as too_large:
        call(guarded, "right", user="x" * 1000)
    assert (too_large.value.status_code, too_large.value.code) == (413, "request_too_large")
    with pytest.raises(openai.APIStatusError) as wrong_media:
        call(guarded, "right", extra_headers={"Content-Type": "text/plain"})
    assert (wrong_media.value.status_code, wrong_media.value.code) == (415, "unsupported_media_type")
    with pytest.raises(openai.RateLimitError) as overloaded:
        call(serve(scripted(overloaded=True)))
    assert overloaded.value.code == "engine_overloaded"
    with pytest.raises(openai.InternalServerError) as dead:
        call(serve(scripted(dead=True)))
    assert (dead.value.status_code, dead.value.code) == (503, "engine_dead")


def test_the_client_raises_an_error_that_comes_inside_a_stream(serve: Any, scripted: Any) -> None:
    with client_of(serve(scripted(fail_after=3))) as opened:
        stream = opened.chat.completions.create(model="scripted", messages=MESSAGES, stream=True)
        seen = ""
        with pytest.raises(openai.APIError, match="the script says so") as caught:
            for chunk in stream:
                seen += chunk.choices[0].delta.content or ""
    assert seen == "Hel"
    assert caught.value.code == "request_failed"


def test_seeds_repeat_and_choices_differ(client: Any) -> None:
    request: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 20, "n": 4, "temperature": 1.5, "seed": 42}
    first, second = (client.chat.completions.create(**request) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in second.choices]
    alone = client.chat.completions.create(**{**request, "n": 1, "seed": 44})
    assert alone.choices[0].message.content == texts[2]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_align_with_the_text(client: Any, stream: bool) -> None:
    request: Any = {
        "model": "demo",
        "messages": MESSAGES,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
        "extra_body": {"repetition_penalty": 1},
    }
    if stream:
        chunks = list(client.chat.completions.create(**request, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        content = [e for chunk in chunks if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    else:
        (choice,) = client.chat.completions.create(**request).choices
        text, content = choice.message.content, choice.logprobs.content
    assert len(content) == 6
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == text
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the most likely one
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )


def test_legacy_logprobs_align_with_the_text(client: Any) -> None:
    (choice,) = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, logprobs=2, temperature=0).choices
    logprobs = choice.logprobs
    assert (
        len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    )
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] in (token, "")  # an end-of-sequence token is no text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_and_never_show(client: Any, stream: bool) -> None:
    request: Any = {
        "model": "demo",
        "prompt": PROMPT,
        "max_tokens": 60,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**request).choices[0].text
    stop = whole[31:38]  # begins and ends inside tokens
    if stream:
        chunks = list(client.completions.create(**request, stop=["never said", stop], stream=True))
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        (choice,) = client.completions.create(**request, stop=["never said", stop]).choices
        text, reason = choice.text, choice.finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_min_tokens_and_ignore_eos_keep_it_talking(client: Any) -> None:
    request: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 200, "temperature": 0}
    short = client.chat.completions.create(**request)
    assert short.choices[0].finish_reason == "stop"
    num_tokens = short.usage.completion_tokens
    longer = client.chat.completions.create(**request, extra_body={"min_tokens": num_tokens + 20})
    assert longer.usage.completion_tokens >= num_tokens + 20
    endless = client.chat.completions.create(**request, extra_body={"ignore_eos": True})
    assert (endless.usage.completion_tokens, endless.choices[0].finish_reason) == (200, "length")


def test_echo_and_batches(client: Any) -> None:
    answer = client.completions.create(model="demo", prompt=[PROMPT, "Open a file"], echo=True, max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith(PROMPT) for choice in answer.choices] == [True, True, False, False]
    assert all(choice.text.startswith("Open a file") for choice in answer.choices[2:])


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 33, 100])
def test_usage_is_exact_and_cached_tokens_are_whole_blocks(client: Any, num_tokens: int) -> None:
    request: Any = {
        "model": "demo",
        "prompt": token_ids(num_tokens),
        "max_tokens": 5,
        "n": 2,
        "extra_body": {"ignore_eos": True, "cache_salt": f"usage-{num_tokens}"},
    }
    first = client.completions.create(**request).usage
    assert (first.prompt_tokens, first.completion_tokens, first.total_tokens) == (num_tokens, 10, num_tokens + 10)
    second = client.completions.create(**request).usage
    assert second.prompt_tokens_details.cached_tokens == (num_tokens - 1) // 16 * 16
    *_, last = client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    assert last.usage == second


def test_salts_separate_caches(client: Any) -> None:
    request: Any = {"model": "demo", "prompt": token_ids(64, start=700), "max_tokens": 1}
    for salt, cached in (("a", 0), ("a", 48), ("b", 0), ("b", 48)):
        usage = client.completions.create(**request, extra_body={"cache_salt": salt}).usage
        assert usage.prompt_tokens_details.cached_tokens == cached
