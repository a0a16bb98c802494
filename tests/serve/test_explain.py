"""A front over scripted workers, as its clients and operators meet it."""

import json
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.router.workers import LoadReport
from dynamo.serve.errors import EngineOverloadedError, WorkerLostError
from dynamo.serve.openapi import openapi_document

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "temperature": 0}
COMPLETION = {"model": "scripted", "prompt": "abcdefgh", "max_tokens": 200, "temperature": 0}


def post(server: Any, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=10)


def lost(worker_id: str = "a") -> WorkerLostError:
    return WorkerLostError(worker_id, "the script says so")


@pytest.fixture
def front(serve: Any, house: Any) -> Any:
    """Starts a server over scripted workers: `front(worker("a"), ..., api_key=...)`."""

    def start(*workers: Any, api_key: str | None = None, **options: Any) -> Any:
        made = house(*workers, **options)
        server = serve(made.engine, routed=made.engine, api_key=api_key)
        server.house = made
        return server

    return start


def chunks_of(response: httpx.Response) -> list[Any]:
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    return [event.removeprefix("data: ") for event in events]


def text_of(chunks: list[Any]) -> str:
    choices = [choice for chunk in chunks for choice in json.loads(chunk).get("choices", ())]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize("after", [0, 1, 30, 64])
def test_a_worker_lost_under_a_stream_changes_nothing_for_the_client(front: Any, worker: Any, after: int) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    whole = chunks_of(post(front(worker("a", cached=4)), "/v1/chat/completions", body))
    server = front(worker("a", [(after, lost())], cached=4), worker("b", [(after // 2, lost("b"))]), worker("c"))
    chunks = chunks_of(post(server, "/v1/chat/completions", body, **{"x-dynamo-timing": "1"}))
    assert chunks[-1] == whole[-1] == "[DONE]"
    assert text_of(chunks[:-1]) == text_of(whole[:-1]) == worker.reply
    usage, undisturbed = json.loads(chunks[-2])["usage"], json.loads(whole[-2])["usage"]
    assert {**usage, "prompt_tokens_details": None} == {**undisturbed, "prompt_tokens_details": None}


@pytest.mark.parametrize("stream", [False, True])
def test_headers_and_timing_say_who_served_it(front: Any, worker: Any, stream: bool) -> None:
    server = front(worker("a", [(5, lost())], cached=4), worker("b", cached=4), mode="round-robin")
    answer = post(server, "/v1/chat/completions", {**CHAT, "stream": stream, "dynamo": {"timing": True}})
    timing = json.loads(chunks_of(answer)[-2])["dynamo"] if stream else answer.json()["dynamo"]
    assert answer.headers["x-dynamo-overlap-blocks"] == "0"
    assert (timing["worker_id"], timing["attempts"]) == ("b", 2)
    assert answer.headers["x-dynamo-worker-id"] == ("a" if stream else "b"), "a stream's headers go out first"
    assert (timing["cached_tokens"], timing["predicted_cached_tokens"]) == (4, 0)
    assert timing["route_us"] > 0 and timing["queue_ms"] >= 0 and timing["ttft_ms"] <= timing["total_ms"]


def test_openais_client_gives_hints_and_reads_what_came_of_them(front: Any, worker: Any) -> None:
    server = front(worker("a"), worker("b", cached=4))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(
            **CHAT, extra_body={"dynamo": {"worker": "b", "timing": True}}
        )
        assert raw.headers["x-dynamo-worker-id"] == "b"
        told = (raw.parse().model_extra or {})["dynamo"]
        assert (told["worker_id"], told["attempts"], told["cached_tokens"]) == ("b", 1, 4)
        headers = {"x-dynamo-exclude": "b", "x-dynamo-timing": "1"}
        *_, last = client.chat.completions.create(**CHAT, stream=True, extra_headers=headers)
        assert (last.model_extra or {})["dynamo"]["worker_id"] == "a"
        with pytest.raises(openai.NotFoundError, match="there is no worker 'z'"):
            client.chat.completions.create(**CHAT, extra_body={"dynamo": {"worker": "z"}})


def test_a_prompt_that_lies_somewhere_is_told_in_blocks(front: Any, worker: Any) -> None:
    server = front(worker("a"), worker("b"))
    first, again = (post(server, "/v1/completions", COMPLETION).headers for _ in range(2))
    assert first["x-dynamo-worker-id"] == again["x-dynamo-worker-id"]
    assert (first["x-dynamo-overlap-blocks"], again["x-dynamo-overlap-blocks"]) == ("0", "2")


def test_a_stream_beyond_help_ends_with_an_error_event(front: Any, worker: Any) -> None:
    server = front(worker("a", [(3, lost())]), limit=0)
    *chunks, last = chunks_of(post(server, "/v1/chat/completions", {**CHAT, "stream": True}))
    assert json.loads(last)["error"]["code"] == "worker_lost" and "[DONE]" not in chunks


@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token_have_a_status(front: Any, worker: Any, stream: bool) -> None:
    def refused(server: Any, **hints: Any) -> tuple[int, str]:
        response = post(server, "/v1/chat/completions", {**CHAT, "stream": stream, "dynamo": hints})
        return response.status_code, response.json()["error"]["code"]

    assert refused(front(worker("a", [(0, lost())]), limit=0)) == (503, "worker_lost")
    assert refused(front(worker("a", [(0, EngineOverloadedError("full"))]))) == (429, "engine_overloaded")
    assert refused(front(wait_s=0.05)) == (503, "no_worker")
    assert refused(front(worker("a")), worker="z") == (404, "worker_not_found")
    assert refused(front(worker("a", [(0, lost())])), worker="a") == (503, "pinned_worker_lost")


def test_health_says_whether_there_is_a_worker(front: Any, worker: Any) -> None:
    server = front(worker("a"))
    assert httpx.get(server.url + "/health").json() == {"status": "ready"}
    server.call(lambda: server.house.workers.leave("a"))
    health = httpx.get(server.url + "/health")
    assert (health.status_code, health.json()) == (503, {"status": "no_worker"})


def test_the_router_explains_what_it_would_do_and_does_nothing(front: Any, worker: Any) -> None:
    links = [worker("a"), worker("b"), worker("c")]
    server = front(*links)
    served = post(server, "/v1/completions", COMPLETION).headers["x-dynamo-worker-id"]
    num_served = sum(len(link.requests) for link in links)
    for _ in range(3):
        asked = {**COMPLETION, "prompt": ["abcdefgh", "zzzz"], "dynamo": {"exclude": ["c"] if served != "c" else ["a"]}}
        answer = post(server, "/router/explain", asked).json()
        assert answer["object"] == "list" and len(answer["data"]) == 2
        warm, cold = answer["data"]
        assert (warm["worker_id"], warm["prompt_tokens"], warm["cached_tokens"]) == (served, 8, 4), (
            "the last one is always computed, with its block"
        )
        assert cold["cached_tokens"] == cold["best_cached_tokens"] == 0
        by_worker = {candidate["worker_id"]: candidate for candidate in warm["candidates"]}
        assert by_worker.keys() == {"a", "b", "c"}
        assert by_worker[served]["blocks"] == {"device": 2, "host": 2, "disk": 2, "remote": 2}
        assert [one["refused"] is None for one in warm["candidates"]] == [True, True, False]
        assert warm["overhead_us"] > 0
    assert sum(len(link.requests) for link in links) == num_served
    chat = post(server, "/router/explain", CHAT).json()["data"]
    assert len(chat) == 1 and chat[0]["mode"] == "kv"


def test_what_cannot_be_routed_is_not_explained_either(front: Any, worker: Any) -> None:
    server = front(worker("a"))
    for body, status, code in (
        ({**CHAT, "dynamo": {"worker": "z"}}, 404, "worker_not_found"),
        ({**CHAT, "model": "other"}, 404, "model_not_found"),
        ({**CHAT, "tools": [{}]}, 400, "unsupported_parameter"),
        ({"model": "scripted"}, 400, "missing_required_parameter"),
        ({**COMPLETION, "dynamo": {"worker": "a", "exclude": ["a"]}}, 400, "invalid_value"),
    ):
        response = post(server, "/router/explain", body)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_where_all_workers_are_busy_that_is_explained_and_no_refusal(front: Any, worker: Any) -> None:
    server = front(busy_requests=1.0, waiting_timeout_s=0.05)

    def crowd() -> None:
        for name in ("a", "b"):
            server.house.workers.join(worker(name), max_running=1)
            server.house.router.report(name, LoadReport(num_running=4, num_waiting=0, prefill_tokens_waiting=0))

    server.call(crowd)
    assert post(server, "/v1/completions", COMPLETION).json()["error"]["code"] == "workers_busy"
    answer = post(server, "/router/explain", COMPLETION)
    assert answer.status_code == 200
    (explanation,) = answer.json()["data"]
    assert (explanation["reason"], explanation["worker_id"] in ("a", "b")) == ("busy", True)
    assert {one["worker_id"]: one["refused"] for one in explanation["candidates"]} == {"a": "busy", "b": "busy"}


def test_the_workers_own_metrics_are_on_a_page_of_the_front(front: Any, worker: Any) -> None:
    server = front(worker("a"), worker("b"), api_key="secret")
    server.house.workers.pages = {"a": b"# HELP x_total X.\n# TYPE x_total counter\nx_total 3.0\n", "b": None}
    page = httpx.get(server.url + "/metrics/workers")
    assert page.headers["content-type"].startswith("text/plain")
    families = {family.name: family.samples for family in text_string_to_metric_families(page.text)}
    assert [(sample.labels, sample.value) for sample in families["x"]] == [({"worker": "a"}, 3)]
    assert [sample.value for sample in families["dynamo_worker_scraped"]] == [1, 0]


def test_what_a_front_does_not_have_is_refused_in_a_sentence(front: Any, worker: Any, serve: Any) -> None:
    refusal = httpx.get(front(worker("a")).url + "/admin/cache")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (404, "unknown_url")
    assert "a front keeps no cache" in refusal.json()["error"]["message"]
    assert "start the server with --admin" in httpx.get(serve().url + "/admin/cache").json()["error"]["message"]
    assert httpx.get(serve().url + "/metrics/workers").status_code == 404


def test_explaining_takes_the_key_that_generating_takes(front: Any, worker: Any) -> None:
    server = front(worker("a"), api_key="secret")
    refused = post(server, "/router/explain", CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert post(server, "/router/explain", CHAT, authorization="Bearer secret").status_code == 200


def test_without_a_router_there_is_nothing_to_explain(serve: Any) -> None:
    assert post(serve(), "/router/explain", CHAT).status_code == 404


def test_the_document_has_the_routers_endpoint_where_there_is_one(front: Any, worker: Any) -> None:
    served = httpx.get(front(worker("a")).url + "/openapi.json").json()
    assert served == openapi_document(routed=True)
    assert set(served["paths"]) - set(openapi_document()["paths"]) == {"/router/explain", "/metrics/workers"}
    references = {part.split('"')[0] for part in json.dumps(served).split("#/components/schemas/")[1:]}
    assert references <= set(served["components"]["schemas"])
    assert {"DynamoFields", "Explanation", "Candidate", "RouteTiming"} <= references
