import json
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from dynamo.serve.engine.request import RoutingHints
from dynamo.serve.errors import RequestError
from dynamo.serve.openai import DynamoFields
from dynamo.serve.routing_hints import read_fields, routing_hints

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}


def post(server: Any, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(server.url + "/v1/chat/completions", json=body, headers=headers, timeout=10)


def test_headers_and_body_say_the_same_things() -> None:
    body = DynamoFields(worker="a", exclude=["b", "c"], session="s", priority=-3, timing=True)
    headers = {
        "x-dynamo-worker": "a",
        "x-dynamo-exclude": "b , c",
        "x-dynamo-session-id": "s",
        "x-dynamo-priority": "-3",
        "x-dynamo-timing": "1",
    }
    assert read_fields(None, headers) == read_fields(body, {}) == read_fields(body, headers) == body
    hints = RoutingHints(worker="a", exclude=frozenset("bc"), session="s", priority=-3)
    assert routing_hints(body) == hints
    assert routing_hints(DynamoFields()) == RoutingHints()


def test_headers_add_to_what_the_body_says() -> None:
    assert read_fields(DynamoFields(session="s"), {"x-dynamo-priority": "7", "x-other": "1"}) == DynamoFields(
        session="s", priority=7
    )


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-dynamo-priority", "101"),
        ("x-dynamo-priority", "high"),
        ("x-dynamo-timing", "maybe"),
        ("x-dynamo-session-id", ""),
        ("x-dynamo-session-id", "s" * 257),
        ("x-dynamo-worker", "w" * 257),
        ("x-dynamo-exclude", "a,,b"),
        ("x-dynamo-exclude", ",".join(map(str, range(65)))),
    ],
)
def test_a_header_outside_its_fields_range_is_refused_by_its_name(header: str, value: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_fields(None, {header: value})
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, header, "invalid_value")
    assert header in refused.value.message and len(refused.value.message) < 300


def test_a_header_may_be_repeated_if_that_says_nothing_else_and_a_list_may_be_spread() -> None:
    twice = [(b"x-dynamo-exclude", b"a"), (b"x-dynamo-exclude", b"b, c"), *[(b"x-dynamo-priority", b"3")] * 2]
    assert read_fields(None, Headers(raw=twice)) == DynamoFields(exclude=["a", "b", "c"], priority=3)
    with pytest.raises(RequestError, match="header x-dynamo-worker says both 'a' and 'b'; send one") as refused:
        read_fields(None, Headers(raw=[(b"x-dynamo-worker", b"a"), (b"x-dynamo-worker", b"b")]))
    assert (refused.value.status, refused.value.param) == (400, "x-dynamo-worker")


def test_header_and_body_that_differ_are_refused() -> None:
    with pytest.raises(RequestError, match=r"x-dynamo-session-id says 'b' and the body's dynamo.session 'a'"):
        read_fields(DynamoFields(session="a"), {"x-dynamo-session-id": "b"})


def test_a_worker_cannot_be_asked_for_and_excluded() -> None:
    with pytest.raises(RequestError, match="both asked for and excluded"):
        routing_hints(DynamoFields(worker="a", exclude=["a"]))


@pytest.mark.parametrize(
    ("field", "param", "code"),
    [
        ({"prioritty": 1}, "dynamo.prioritty", "unknown_parameter"),
        ({"priority": 101}, "dynamo.priority", "invalid_value"),
        ({"priority": "1"}, "dynamo.priority", "invalid_type"),
        ({"worker": ""}, "dynamo.worker", "invalid_value"),
        ({"exclude": ["x"] * 65}, "dynamo.exclude", "invalid_value"),
        ({"session": "s" * 257}, "dynamo.session", "invalid_value"),
    ],
)
def test_the_body_field_is_checked_like_every_other(serve: Any, field: Any, param: str, code: str) -> None:
    response = post(serve(), {**CHAT, "dynamo": field})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


def test_without_workers_hints_reach_the_engine_and_a_pin_is_refused(serve: Any, scripted: Any) -> None:
    engine = scripted()
    server = serve(engine)
    answer = post(server, {**CHAT, "dynamo": {"session": "s"}}, **{"x-dynamo-priority": "5"})
    assert answer.status_code == 200
    assert "x-dynamo-worker-id" not in answer.headers
    assert engine.requests[0].routing == RoutingHints(session="s", priority=5)
    refused = post(server, CHAT, **{"x-dynamo-worker": "worker-0"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (404, "worker_not_found", "dynamo.worker")
    assert "worker-0" in error["message"] and len(engine.requests) == 1


@pytest.mark.parametrize("num_choices", [1, 2])
def test_timing_is_told_to_whom_asks(serve: Any, scripted: Any, num_choices: int) -> None:
    server = serve(scripted(reply="abc", num_cached_tokens=2))
    asked = {**CHAT, "dynamo": {"timing": True}, "n": num_choices}
    timing = post(server, asked).json()["dynamo"]
    assert timing["cached_tokens"] == 2
    assert 0 < timing["ttft_ms"] <= timing["total_ms"]
    assert not {"worker_id", "attempts", "queue_ms", "route_us"} & timing.keys(), "there is no router"
    assert len(timing.get("choices", [timing])) == num_choices
    assert "dynamo" not in post(server, CHAT).json()


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streams_timing_is_in_its_last_chunk(serve: Any, include_usage: bool) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": include_usage}}
    *chunks, last, done = post(serve(), body, **{"x-dynamo-timing": "true"}).text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    assert all("dynamo" not in chunk for chunk in chunks)
    told = json.loads(last.removeprefix("data: "))
    assert told["choices"] == [] and told["dynamo"]["total_ms"] > 0
    assert ("usage" in told) is include_usage


@pytest.mark.parametrize(
    ("header", "text", "says"),
    [
        ("x-dynamo-priority", "high", "expected a whole number from -100 to 100"),
        ("x-dynamo-priority", "101", "expected a whole number from -100 to 100"),
        ("x-dynamo-timing", "maybe", "expected 1 or 0, true or false"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused_with_what_could_be(header: str, text: str, says: str) -> None:
    with pytest.raises(RequestError, match=rf"^invalid value '{text}' in header {header}: {says}$"):
        read_fields(None, {header: text})
