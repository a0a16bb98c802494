import asyncio
import contextlib
import http.client
import json
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from dynamo.serve.engine.request import SamplingDefaults

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "scripted", "prompt": "hi"}


def post(server: Any, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=10, **options)


def error_of(response: httpx.Response, status: int, code: str | None) -> dict[str, Any]:
    body = response.json()
    assert (response.status_code, body["error"]["code"]) == (status, code)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert "Traceback" not in response.text
    error: dict[str, Any] = body["error"]
    return error


def sse(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    parts = [line.removeprefix("data: ") for line in response.text.split("\n\n")[:-1]]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


@contextlib.contextmanager
def connection(server: Any) -> Iterator[socket.socket]:
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as client:
        yield client


def raw_post(path: str, body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


def test_a_chat_completion(serve: Any, scripted: Any) -> None:
    server = serve(scripted(reply="Hello, world.", num_cached_tokens=3))
    body = post(server, "/v1/chat/completions", CHAT).json()
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, world.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    num_prompt = 1 + len("user: hi\n")
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 13,
        "total_tokens": num_prompt + 13,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_says_the_same_as_an_answer_in_one_piece(serve: Any, scripted: Any, path: str) -> None:
    server = serve(scripted(reply="é, 漢 and 🎉", num_cached_tokens=2))
    request = {**(CHAT if "chat" in path else COMPLETION), "n": 3, "max_tokens": 400}
    whole = post(server, path, request).json()
    streamed = post(server, path, {**request, "stream": True, "stream_options": {"include_usage": True}})
    *chunks, usage, done = sse(streamed)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in [*chunks, usage]}) == 1
    texts, ends = [""] * 3, [0] * 3
    for chunk in chunks:
        (choice,) = chunk["choices"]
        text = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        assert "�" not in text
        texts[choice["index"]] += text
        ends[choice["index"]] += choice["finish_reason"] is not None
    assert ends == [1, 1, 1]
    assert texts == [c["message"]["content"] if "message" in c else c["text"] for c in whole["choices"]]


def test_batches_of_prompts_number_their_choices_prompt_by_prompt(serve: Any, scripted: Any) -> None:
    engine = scripted(reply="!")
    server = serve(engine)
    body = post(
        server, "/v1/completions", {**COMPLETION, "prompt": ["a", "bc"], "n": 2, "echo": True, "seed": 7}
    ).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "a!"),
        (1, "a!"),
        (2, "bc!"),
        (3, "bc!"),
    ]
    assert body["usage"]["prompt_tokens"] == 3
    assert [(request.prompt_token_ids, request.sampling.seed) for request in engine.requests] == [
        ([97], 7),
        ([97], 8),
        ([98, 99], 7),
        ([98, 99], 8),
    ]
    assert len({request.request_id for request in engine.requests}) == 4


def test_token_id_prompts_are_echoed_as_text(serve: Any, scripted: Any) -> None:
    body = post(
        serve(scripted(reply="!")), "/v1/completions", {**COMPLETION, "prompt": [104, 105], "echo": True}
    ).json()
    assert body["choices"][0]["text"] == "hi!"


@pytest.mark.parametrize("logprobs", [None, 1])
def test_token_ids_come_with_a_completion_that_asks_for_them(serve: Any, scripted: Any, logprobs: int | None) -> None:
    server = serve(scripted(reply="né", tokens_per_step=1))
    body = {**COMPLETION, "return_token_ids": True, "logprobs": logprobs}
    assert post(server, "/v1/completions", body).json()["choices"][0]["token_ids"] == list("né".encode())
    chunks = sse(post(server, "/v1/completions", {**body, "stream": True}))[:-1]
    parts = [(chunk["choices"][0]["text"], chunk["choices"][0].get("token_ids")) for chunk in chunks]
    assert parts == [("n", [110]), ("", [0xC3]), ("é", [0xA9]), ("", None)], "also those that have no text yet"
    assert "token_ids" not in post(server, "/v1/completions", COMPLETION).json()["choices"][0]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_align_with_tokens_on_both_endpoints(serve: Any, scripted: Any, stream: bool) -> None:
    server = serve(scripted(reply="né", tokens_per_step=2))
    chat = post(server, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "stream": stream})
    legacy = post(server, "/v1/completions", {**COMPLETION, "logprobs": 2, "stream": stream})
    if stream:
        chat_choices = [chunk["choices"][0]["logprobs"] for chunk in sse(chat)[:-1]]
        legacy_choices = [chunk["choices"][0]["logprobs"] for chunk in sse(legacy)[:-1]]
    else:
        chat_choices = [chat.json()["choices"][0]["logprobs"]]
        legacy_choices = [legacy.json()["choices"][0]["logprobs"]]
    content = [entry for logprobs in chat_choices if logprobs for entry in logprobs["content"]]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "né"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    offsets = [offset for logprobs in legacy_choices if logprobs for offset in logprobs["text_offset"]]
    assert offsets == [0, 1, 1]


def test_defaults_of_the_model_folder_reach_the_engine(serve: Any, scripted: Any) -> None:
    engine = scripted()
    post(serve(engine, defaults=SamplingDefaults(temperature=0.5, top_k=9)), "/v1/chat/completions", CHAT)
    assert (engine.requests[0].sampling.temperature, engine.requests[0].sampling.top_k) == (0.5, 9)


def test_the_clients_request_id_comes_back_where_it_is_sane(serve: Any) -> None:
    server = serve()
    assert httpx.get(server.url + "/live", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert (
        httpx.get(server.url + "/live", headers={"x-request-id": "a b" * 99}).headers["x-request-id"].startswith("req_")
    )


def test_refusals_use_openais_envelope(serve: Any) -> None:
    server = serve()
    error = error_of(post(server, "/v1/chat/completions", {**CHAT, "model": "other"}), 404, "model_not_found")
    assert error["param"] == "model" and "scripted" in error["message"]
    error = error_of(post(server, "/v1/chat/completions", {**CHAT, "tools": [{}]}), 400, "unsupported_parameter")
    assert error["param"] == "tools"
    error = error_of(post(server, "/v1/completions", {**COMPLETION, "max_tokens": 600}), 400, "context_length_exceeded")
    assert "512" in error["message"] and "602" in error["message"]
    error_of(httpx.get(server.url + "/v1/nothing"), 404, "unknown_url")
    error_of(httpx.get(server.url + "/v1/models/other"), 404, "model_not_found")
    wrong_method = httpx.get(server.url + "/v1/completions")
    error_of(wrong_method, 405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "POST"
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = httpx.post(server.url + "/v1/completions", content=b"{}", headers={"content-type": content_type})
        error_of(response, 415, "unsupported_media_type")


def test_bodies_beyond_the_bound_are_refused_announced_or_not(serve: Any) -> None:
    server = serve(max_body_bytes=1000)
    announced = httpx.post(
        server.url + "/v1/completions", content=b" " * 1001, headers={"content-type": "application/json"}
    )
    error_of(announced, 413, "request_too_large")
    chunked = httpx.post(
        server.url + "/v1/completions", content=iter([b" " * 600] * 2), headers={"content-type": "application/json"}
    )
    error_of(chunked, 413, "request_too_large")
    assert chunked.headers["connection"] == "close"


def test_an_api_key_guards_everything_below_v1(serve: Any) -> None:
    server = serve(api_key="sécret")
    key = "Bearer sécret".encode()
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "sécret".encode()},
        {"authorization": b"Bearer \xff"},
    ):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/nothing")):
            response = httpx.request(method, server.url + path, headers=headers)
            error_of(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(server.url + "/v1/models", headers={"authorization": key}).status_code == 200
    for path in ("/health", "/live", "/metrics", "/openapi.json", "/docs"):
        assert httpx.get(server.url + path).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_overloaded_engine_is_a_429_that_says_when_to_come_back(serve: Any, scripted: Any, stream: bool) -> None:
    response = post(serve(scripted(overloaded=True)), "/v1/chat/completions", {**CHAT, "stream": stream, "n": 2})
    error_of(response, 429, "engine_overloaded")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_before_its_first_token_has_a_status_of_its_own(
    serve: Any, scripted: Any, stream: bool
) -> None:
    response = post(serve(scripted(fail_after=0)), "/v1/chat/completions", {**CHAT, "stream": stream})
    assert error_of(response, 500, "request_failed")["type"] == "server_error"


def test_an_error_nobody_foresaw_tells_the_client_nothing_and_is_logged_once(
    serve: Any, scripted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(scripted(fail_after=0, failure=ZeroDivisionError("the secret")))
    response = post(server, "/v1/chat/completions", CHAT)
    assert "secret" not in error_of(response, 500, "internal_error")["message"]
    assert caplog.text.count("ZeroDivisionError: the secret") == 1


@pytest.mark.parametrize("failure", [None, ZeroDivisionError("the secret")])
def test_a_stream_that_fails_ends_with_an_error_event_and_without_done(serve: Any, scripted: Any, failure: Any) -> None:
    engine = scripted(fail_after=3)
    engine.failure = failure or engine.failure
    server = serve(engine)
    *chunks, last = sse(post(server, "/v1/chat/completions", {**CHAT, "stream": True}))
    assert set(last) == {"error"}
    assert "secret" not in last["error"]["message"]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert 'dynamo_stream_errors_total{code="' in httpx.get(server.url + "/metrics").text


def test_a_dead_engine_is_a_503_everywhere(serve: Any, scripted: Any) -> None:
    server = serve(scripted(dead=True))
    error_of(post(server, "/v1/chat/completions", CHAT), 503, "engine_dead")
    health = httpx.get(server.url + "/health")
    assert (health.status_code, health.json()) == (503, {"status": "dead"})
    assert httpx.get(server.url + "/live").status_code == 200


def test_draining_refuses_new_requests_and_lets_running_ones_finish(serve: Any, scripted: Any) -> None:
    engine = scripted(hold_after=3)
    server = serve(engine)
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=10
    ) as running:
        lines = running.iter_lines()
        next(lines)
        server.call(server.frontend.begin_drain)
        health = httpx.get(server.url + "/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        error_of(post(server, "/v1/chat/completions", CHAT), 503, "shutting_down")
        idle = asyncio.run_coroutine_threadsafe(server.frontend.wait_idle(10), server.loop)
        assert not idle.done()
        server.call(engine.proceed.set)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert idle.result(10)


def test_aborted_requests_are_told_so(serve: Any, scripted: Any) -> None:
    engine = scripted(hold_after=3)
    server = serve(engine)
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=10
    ) as running:
        lines = running.iter_lines()
        next(lines)
        server.call(server.frontend.abort_requests)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert not engine.live


@pytest.mark.parametrize(("path", "request_body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_the_answer_names_the_stop_that_ended_it(serve: Any, scripted: Any, path: str, request_body: Any) -> None:
    (choice,) = post(serve(scripted(stop_reason="when")), path, request_body).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "when")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_choices", [1, 4])
def test_generation_stops_within_a_tenth_of_a_second_of_a_disconnect(
    serve: Any, scripted: Any, eventually: Any, stream: bool, num_choices: int
) -> None:
    engine = scripted(hold_after=2)
    server = serve(engine)
    with connection(server) as client:
        client.sendall(raw_post("/v1/chat/completions", {**CHAT, "stream": stream, "n": num_choices}))
        eventually(lambda: len(engine.live) == num_choices)
        left = time.perf_counter()
    eventually(lambda: len(engine.ended) == num_choices)
    assert max(engine.ended.values()) - left < 0.1
    eventually(lambda: "dynamo_disconnects_total 1.0" in httpx.get(server.url + "/metrics").text)
    metrics = httpx.get(server.url + "/metrics").text
    assert 'dynamo_requests_total{endpoint="/v1/chat/completions",status="499"} 1.0' in metrics
    assert "dynamo_active_requests 0.0" in metrics


def test_a_client_that_does_not_read_costs_no_memory_and_holds_nobody_up(
    serve: Any, scripted: Any, eventually: Any
) -> None:
    engine = scripted(reply="x" * 400_000, max_model_len=1_000_000)
    server = serve(engine)
    with connection(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(raw_post("/v1/completions", {**COMPLETION, "max_tokens": 400_000, "stream": True}))
        eventually(lambda: len(engine.live) == 1)
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        metric = "dynamo_inter_token_latency_seconds_count"

        def num_written() -> float:
            text = httpx.get(server.url + "/metrics").text
            return float(text.partition(f"\n{metric} ")[2].partition("\n")[0])

        # The kernel's buffers fill up, and then nothing moves while other clients are answered.
        last = -1.0
        while (now := num_written()) != last:
            last = now
            for _ in range(5):
                assert post(server, "/v1/completions", {**COMPLETION, "max_tokens": 1}).status_code == 200
        assert last < 100_000
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 32 << 10
    eventually(lambda: not engine.live)


def test_the_first_byte_of_a_stream_does_not_wait_for_delayed_acknowledgements(serve: Any, scripted: Any) -> None:
    server = serve(scripted(reply="x"))
    fastest_s = 10.0
    with connection(server) as client:
        for _ in range(10):
            started = time.perf_counter()
            client.sendall(raw_post("/v1/chat/completions", {**CHAT, "stream": True}))
            answer = b""
            while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                answer += client.recv(65536)
            fastest_s = min(fastest_s, time.perf_counter() - started)
    assert fastest_s < 0.035  # Nagle's algorithm against a delayed acknowledgement costs 40 ms each time


def test_the_first_token_leaves_alone_with_the_role(serve: Any, scripted: Any) -> None:
    server = serve(scripted(reply="abc"))
    with connection(server) as client:
        client.sendall(raw_post("/v1/chat/completions", {**CHAT, "stream": True}))
        response = http.client.HTTPResponse(client)
        response.begin()
        first = response.read1(65536)
    assert first.count(b"data: ") == 2  # the role and the first token


def test_models_are_listed(serve: Any) -> None:
    server = serve()
    listed = httpx.get(server.url + "/v1/models").json()
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == ("scripted", "model", "dynamo", 512)
    assert httpx.get(server.url + "/v1/models/scripted").json() == card


def test_the_root_leads_to_the_docs(serve: Any) -> None:
    server = serve()
    response = httpx.get(server.url + "/", follow_redirects=True)
    assert response.url.path == "/docs"
    assert "/openapi.json" in response.text
    assert "http" not in response.text.replace("http-equiv", ""), "the page must fetch nothing from elsewhere"


def test_metrics_count_tokens_and_time(serve: Any, scripted: Any) -> None:
    server = serve(scripted(reply="abcd", num_cached_tokens=2))
    post(server, "/v1/completions", {**COMPLETION, "n": 2})
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    for line in (
        'dynamo_requests_total{endpoint="/v1/completions",status="200"} 1.0',
        "dynamo_prompt_tokens_total 2.0",
        "dynamo_completion_tokens_total 8.0",
        "dynamo_cached_tokens_total 2.0",
        "dynamo_time_to_first_token_seconds_count 1.0",
        "dynamo_inter_token_latency_seconds_count 6.0",
        "dynamo_request_duration_seconds_count 1.0",
        "dynamo_engine_running_sequences 0.0",
    ):
        assert line in lines


def test_a_request_whose_body_is_on_its_way_is_refused_when_draining_begins(
    serve: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    with connection(server) as client:
        client.sendall(raw_post("/v1/completions", COMPLETION)[:-1])
        # An answer to a later request: the first one has been read by then.
        assert httpx.get(server.url + "/live").status_code == 200
        server.call(server.frontend.begin_drain)
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"shutting_down" in answer
    assert asyncio.run_coroutine_threadsafe(server.frontend.wait_idle(1), server.loop).result(10)
    assert not caplog.records


def test_aborting_does_not_wait_for_a_client_that_does_not_read(serve: Any, scripted: Any, eventually: Any) -> None:
    engine = scripted(reply="x" * 400_000, max_model_len=1_000_000)
    server = serve(engine)
    with connection(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(raw_post("/v1/completions", {**COMPLETION, "max_tokens": 400_000, "stream": True}))
        eventually(lambda: len(engine.live) == 1)
        server.call(server.frontend.abort_requests)
        assert asyncio.run_coroutine_threadsafe(server.frontend.wait_idle(4), server.loop).result(10)
    assert not engine.live


@pytest.mark.parametrize("value", [True, False, None])
def test_obfuscation_of_streams_may_only_be_declined(serve: Any, value: bool | None) -> None:
    options = {"stream": True, "stream_options": {"include_obfuscation": value}}
    response = post(serve(), "/v1/chat/completions", {**CHAT, **options})
    if not value:
        assert response.status_code == 200
        return
    error = error_of(response, 400, "unsupported_parameter")
    assert error["param"] == "stream_options.include_obfuscation"
