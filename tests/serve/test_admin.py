"""The admin endpoints: what they do, whom they answer, and what they refuse."""

import contextlib
import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jsonschema
import pytest
import torch

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.errors import CacheClosedError
from dynamo.serve.admin import MAX_ADMIN_BODY_BYTES, OPERATIONS
from dynamo.serve.openapi import openapi_document
from dynamo.tiers import disk_space
from dynamo.tiers.disk_space import DiskSpace

SPEC = KVSpec(model="admin", num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32, block_size=4)
SLOT = 4096
TEXT = "What does os.path.join do in Python?"  # 36 bytes, so 9 blocks, of which 8 count for an open


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[KVCache]:
    """Holds TEXT in all three tiers."""
    with KVCache(
        SPEC, device="cpu", device_blocks=64, host=32 * SLOT, disk=f"{tmp_path}:{64 * SLOT}", scrub_bytes_per_s=0
    ) as cache:
        remember(cache, list(TEXT.encode()))
        yield cache
    cache.check_invariants()


def remember(cache: KVCache, tokens: list[int], salt: str = "") -> None:
    with cache.open(tokens, salt=salt) as sequence:
        sequence.wait()
        sequence.commit()
    assert cache.flush()


def call(server: Any, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
    if body is not None:
        options["json"] = body
    return httpx.request(method, f"{server.url}/admin/cache{path}", timeout=30, **options)


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return response.status_code, body["error"]["code"], body["error"]["param"]


# --- what they do


def test_the_status_tells_tiers_pins_and_queues(serve: Any, cache: KVCache) -> None:
    status = call(serve(cache=cache), "GET", "").json()
    assert [tier["tier"] for tier in status["tiers"]] == ["device", "host", "disk"]
    host = status["tiers"][1]
    assert (host["num_slots"], host["num_cached_blocks"], host["num_idle_blocks"]) == (32, 9, 9)
    assert (host["num_pinned_blocks"], host["num_bytes"], host["num_cached_bytes"]) == (0, 32 * SLOT, 9 * SLOT)
    assert status["tiers"][2]["path"] in ("O_DIRECT", "buffered")
    assert (status["pins"], status["num_loads"], status["num_pending_disk_blocks"]) == ([], 0, 0)
    assert status["window"]["num_requests"] == 1


def test_lookup_takes_text_token_ids_and_messages_as_the_api_does(serve: Any, cache: KVCache, codec: Any) -> None:
    server = serve(cache=cache)
    everywhere = {"device_tokens": 36, "host_tokens": 36, "disk_tokens": 36, "cached_tokens": 36}
    assert call(server, "POST", "/lookup", {"prompt": TEXT}).json() == everywhere
    assert call(server, "POST", "/lookup", {"prompt": list(TEXT.encode())}).json() == everywhere
    assert call(server, "POST", "/lookup", {"prompt": TEXT, "cache_salt": "other"}).json()["cached_tokens"] == 0
    messages = [{"role": "user", "content": "hello, cache"}]
    assert call(server, "POST", "/lookup", {"messages": messages}).json()["cached_tokens"] == 0
    remember(cache, codec.apply_chat_template(messages, max_tokens=512), salt="mine")
    answer = call(server, "POST", "/lookup", {"messages": messages, "cache_salt": "mine"}).json()
    assert answer["device_tokens"] == 20


def test_prefetch_brings_blocks_up_and_says_how_many_tokens(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    cache.clear("device")
    assert cache.lookup(list(TEXT.encode())).device_tokens == 0
    assert call(server, "POST", "/prefetch", {"prompt": TEXT, "timeout_s": 20}).json() == {"device_tokens": 36}
    assert cache.lookup(list(TEXT.encode())).device_tokens == 36
    assert call(server, "POST", "/prefetch", {"prompt": "never seen"}).json() == {"device_tokens": 0}


def test_pins_can_be_made_extended_listed_and_ended_once(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    pin = call(server, "POST", "/pins", {"prompt": TEXT, "ttl_s": 60, "name": "greeting"}).json()
    assert (pin["blocks"], pin["num_tokens"], pin["ttl_s"]) == ({"host": 9, "disk": 9}, 36, 60)
    (listed,) = call(server, "GET", "").json()["pins"]
    assert (listed["pin_id"], listed["name"]) == (pin["pin_id"], "greeting")
    assert 0 < listed["remaining_s"] <= 60
    path = f"/pins/{pin['pin_id']}"
    assert call(server, "POST", path, {"ttl_s": 3600}).json() == {"pin_id": pin["pin_id"], "ttl_s": 3600}
    (listed,) = call(server, "GET", "").json()["pins"]
    assert listed["remaining_s"] > 3000
    cache.clear()
    assert cache.lookup(list(TEXT.encode())).host_tokens == 36
    assert call(server, "DELETE", path).json() == {"pin_id": pin["pin_id"]}
    assert error_of(call(server, "DELETE", path)) == (404, "pin_not_found", "pin_id")
    assert error_of(call(server, "POST", path, {"ttl_s": 5})) == (404, "pin_not_found", "pin_id")
    cache.clear()
    assert cache.lookup(list(TEXT.encode())).cached_tokens == 0


def test_the_pin_of_a_client_that_died_vanishes(serve: Any, cache: KVCache, eventually: Any) -> None:
    server = serve(cache=cache)
    assert call(server, "POST", "/pins", {"prompt": TEXT, "ttl_s": 0.05}).status_code == 200
    eventually(lambda: call(server, "GET", "").json()["pins"] == [])
    assert cache.stats().tier("host").num_pinned_blocks == 0


def test_a_pin_that_would_hold_too_much_is_refused(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    long = "x" * 100
    remember(cache, list(long.encode()))
    response = call(server, "POST", "/pins", {"prompt": long})
    assert error_of(response) == (409, "pin_limit", None)
    assert "of which they may hold 16" in response.json()["error"]["message"]
    assert cache.pins() == ()


def test_explain_tells_where_a_prompts_cached_part_ends_and_why(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    keys = cache.block_keys(list(TEXT.encode()))
    whole = call(server, "POST", "/explain", {"prompt": TEXT}).json()
    assert (whole["position"], whole["key"]) == (8, keys[8].hex())
    assert [(tier["tier"], tier["state"]) for tier in whole["tiers"]] == [
        ("device", "idle"),
        ("host", "idle"),
        ("disk", "idle"),
    ]
    assert whole["tiers"][0]["num_children"] == 0
    with cache.pin(list(TEXT.encode())[:12], tiers=["host"]):
        first = call(server, "POST", "/explain", {"key": keys[0].hex().upper()}).json()
        assert (first["position"], first["tiers"][1]["state"], first["tiers"][1]["num_users"]) == (None, "held", 1)
        assert first["tiers"][1]["num_children"] == 1
    cache.clear()
    gone = call(server, "POST", "/explain", {"prompt": TEXT}).json()
    assert gone["position"] == 0
    assert [tier["state"] for tier in gone["tiers"]] == ["removed"] * 3
    assert gone["tiers"][0]["removal"] == "cleared" and gone["tiers"][0]["removed_s"] >= 0
    never = call(server, "POST", "/explain", {"key": "0" * 32}).json()
    assert [tier["state"] for tier in never["tiers"]] == ["unknown"] * 3


def test_clear_empties_a_tier_or_all(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    assert call(server, "POST", "/clear", {"tier": "host"}).json() == {
        "cached_blocks": {"device": 9, "host": 0, "disk": 9}
    }
    assert call(server, "POST", "/clear", {"tier": "all"}).json()["cached_blocks"] == {
        "device": 0,
        "host": 0,
        "disk": 0,
    }


def test_resize_gives_a_tier_another_size(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    answer = call(server, "POST", "/resize", {"tier": "disk", "size": "128KiB"}).json()
    assert answer == {"num_slots": 32, "num_bytes": 128 << 10, "warning": None}
    assert call(server, "GET", "").json()["tiers"][2]["num_slots"] == 32
    assert error_of(call(server, "POST", "/resize", {"tier": "disk", "size": 1})) == (400, "invalid_value", None)
    assert error_of(call(server, "POST", "/resize", {"tier": "host", "size": "1TiB"}))[:2] == (400, "invalid_value")


def test_resize_beyond_what_the_disk_has_free_says_so(
    serve: Any, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_space, "disk_space", lambda where, size: [DiskSpace(tuple(where), size, 0, 50 * SLOT)])
    server = serve(cache=cache)
    for num_slots, is_too_large in ((128, True), (40, False)):
        answer = call(server, "POST", "/resize", {"tier": "disk", "size": num_slots * SLOT}).json()
        assert answer["num_slots"] == num_slots
        assert (answer["warning"] is not None) == is_too_large
    answer = call(server, "POST", "/resize", {"tier": "disk", "size": 51 * SLOT}).json()
    assert "204,800 bytes free" in answer["warning"] and "4,096 too few" in answer["warning"]
    assert call(server, "POST", "/resize", {"tier": "host", "size": 16 * SLOT}).json()["warning"] is None


def test_verify_finds_what_was_damaged(serve: Any, cache: KVCache, tmp_path: Path) -> None:
    server = serve(cache=cache)
    (path,) = tmp_path.rglob("blocks.dat")
    with path.open("r+b") as file:
        file.seek(SLOT * 2)
        file.write(b"\xff\x01\xff")
    answer = call(server, "POST", "/verify", {"timeout_s": 20}).json()
    assert (answer["num_checked"], answer["num_corrupt"], answer["is_complete"]) == (9, 1, True)
    assert 'dynamo_kvcache_verify_faults_total{reason="corrupt"}' not in httpx.get(server.url + "/metrics").text
    assert cache.stats().verify_faults == {"corrupt": 1}


def test_what_a_cache_cannot_do_is_said(serve: Any) -> None:
    with KVCache(SPEC, device="cpu", device_blocks=8) as cache:
        server = serve(cache=cache)
        assert error_of(call(server, "POST", "/verify", {})) == (400, "unsupported_operation", None)
        body = {"tier": "host", "size": "1GiB"}
        assert error_of(call(server, "POST", "/resize", body)) == (400, "unsupported_operation", None)


# --- whom they answer


def test_without_the_flag_there_is_nothing(serve: Any) -> None:
    server = serve()
    for operation in OPERATIONS:
        assert httpx.request(operation.method, server.url + operation.path).status_code == 404
    assert "/admin" not in httpx.get(server.url + "/openapi.json").text


def test_the_api_key_is_asked_for_everywhere(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache, api_key="sécret")
    for operation in OPERATIONS:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": b"Bearer \xff"}):
            response = httpx.request(operation.method, server.url + operation.path, headers=headers, json={})
            assert error_of(response) == (401, "invalid_api_key", None)
            assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(server.url + "/admin/nothing").status_code == 401
    key = {"authorization": "Bearer sécret".encode(), "host": "kv.example.com"}
    assert call(server, "GET", "", headers=key).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example.com", "127.0.0.1.evil.example.com", "0.0.0.0", "[::2]:80", "", "[", "]:1"]
)
def test_without_a_key_other_names_of_this_machine_are_refused(serve: Any, cache: KVCache, host: str) -> None:
    server = serve(cache=cache)
    assert error_of(call(server, "GET", "", headers={"host": host})) == (403, "not_local", None)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "127.9.9.9"])
def test_without_a_key_names_of_this_machine_are_accepted(serve: Any, cache: KVCache, host: str) -> None:
    assert call(serve(cache=cache), "GET", "", headers={"host": host}).status_code == 200


def test_a_web_page_cannot_send_what_needs_no_preflight(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = httpx.post(
            server.url + "/admin/cache/clear", content='{"tier": "all"}', headers={"content-type": content_type}
        )
        assert error_of(response) == (415, "unsupported_media_type", None)
    assert cache.lookup(list(TEXT.encode())).device_tokens == 36


# --- what they refuse

PROMPT = {"prompt": TEXT}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/lookup", {}, "invalid_value", "prompt"),
        ("/lookup", {"prompt": TEXT, "messages": [{"role": "user", "content": "x"}]}, "invalid_value", "prompt"),
        ("/lookup", {"prompt": None}, "invalid_value", "prompt"),
        ("/lookup", {"prompt": ""}, "invalid_value", "prompt"),
        ("/lookup", {"prompt": []}, "invalid_value", "prompt"),
        ("/lookup", {"prompt": [-1]}, "invalid_value", "prompt[0]"),
        ("/lookup", {"prompt": [258]}, "invalid_value", "prompt"),
        ("/lookup", {"prompt": [1.5]}, "invalid_type", "prompt[0]"),
        ("/lookup", {"prompt": ["a"]}, "invalid_type", "prompt[0]"),
        ("/lookup", {"prompt": 7}, "invalid_type", "prompt"),
        ("/lookup", {"prompt": {}}, "invalid_type", "prompt"),
        ("/lookup", {"prompt": "x" * 600}, "context_length_exceeded", "prompt"),
        ("/lookup", {"prompt": [1] * 600}, "context_length_exceeded", "prompt"),
        ("/lookup", {"messages": []}, "invalid_value", "messages"),
        ("/lookup", {"messages": [{"role": "wizard", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ("/lookup", {**PROMPT, "cache_salt": "x" * 513}, "invalid_value", "cache_salt"),
        ("/lookup", {**PROMPT, "tier": "host"}, "unknown_parameter", "tier"),
        ("/prefetch", {**PROMPT, "timeout_s": 0}, "invalid_value", "timeout_s"),
        ("/prefetch", {**PROMPT, "timeout_s": 1e9}, "invalid_value", "timeout_s"),
        ("/prefetch", {**PROMPT, "timeout_s": "1"}, "invalid_type", "timeout_s"),
        ("/pins", {**PROMPT, "ttl_s": -5}, "invalid_value", "ttl_s"),
        ("/pins", {**PROMPT, "ttl_s": 1e99}, "invalid_value", "ttl_s"),
        ("/pins", {**PROMPT, "tiers": []}, "invalid_value", "tiers"),
        ("/pins", {**PROMPT, "tiers": ["tape"]}, "invalid_value", "tiers[0]"),
        ("/pins", {**PROMPT, "tiers": "host"}, "invalid_type", "tiers"),
        ("/pins", {**PROMPT, "name": "x" * 513}, "invalid_value", "name"),
        ("/pins/pin_x", {}, "missing_required_parameter", "ttl_s"),
        ("/explain", {}, "invalid_value", "prompt"),
        ("/explain", {"key": "0" * 31}, "invalid_value", "key"),
        ("/explain", {"key": "g" * 32}, "invalid_value", "key"),
        ("/explain", {"key": "0" * 32 + "\n"}, "invalid_value", "key"),
        ("/explain", {"key": "0" * 32, "prompt": "x"}, "invalid_value", "key"),
        ("/explain", {"prompt": "abc"}, "invalid_value", None),
        ("/clear", {}, "missing_required_parameter", "tier"),
        ("/clear", {"tier": "tape"}, "invalid_value", "tier"),
        ("/clear", {"tier": None}, "invalid_type", "tier"),
        ("/resize", {"tier": "device", "size": 1}, "invalid_value", "tier"),
        ("/resize", {"tier": "host"}, "missing_required_parameter", "size"),
        ("/resize", {"tier": "host", "size": -1}, "invalid_value", "size"),
        ("/resize", {"tier": "host", "size": 2**63}, "invalid_value", "size"),
        ("/resize", {"tier": "host", "size": "much"}, "invalid_value", None),
        ("/resize", {"tier": "host", "size": "9" * 60}, "invalid_value", None),
        ("/verify", {"timeout_s": float("1e308")}, "invalid_value", "timeout_s"),
    ],
)
def test_wrong_bodies_are_refused_by_name(
    serve: Any, cache: KVCache, path: str, body: Any, code: str, param: str | None
) -> None:
    response = call(serve(cache=cache), "POST", path, body)
    assert error_of(response) == (400, code, param), response.text
    assert cache.lookup(list(TEXT.encode())).device_tokens == 36


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b'"x"', b"{", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"prompt": [' * 5000],
    ids=["empty", "null", "list", "text", "open", "nan", "not-utf8", "deep", "deep-field"],
)
def test_junk_is_a_400(serve: Any, cache: KVCache, content: bytes) -> None:
    server = serve(cache=cache)
    headers = {"content-type": "application/json"}
    response = httpx.post(server.url + "/admin/cache/lookup", content=content, headers=headers, timeout=30)
    assert error_of(response)[0] == 400


def test_huge_bodies_are_refused_unread(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    with lookup_with_body(server, b"Content-Length: %d" % (1 << 40)) as (client, answer):
        assert answer.status == 413, "answered by what was announced, before a byte of it was there"
        assert json.loads(answer.read())["error"]["code"] == "request_too_large"
        assert answer.getheader("connection") == "close"
        with pytest.raises(OSError):  # it ends somewhere, long before the whole body
            for _ in range(1 << 10):
                client.sendall(bytes(1 << 20))
    chunked = httpx.post(
        server.url + "/admin/cache/lookup",
        content=(b"[" * 65536 for _ in range(MAX_ADMIN_BODY_BYTES // 65536 + 1)),
        headers={"content-type": "application/json"},
        timeout=30,
    )
    assert error_of(chunked) == (413, "request_too_large", None)


def test_a_client_that_sends_its_huge_body_first_reads_why_it_was_refused(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    body = bytes(MAX_ADMIN_BODY_BYTES + 1)
    with lookup_with_body(server, b"Content-Length: %d" % len(body)) as (client, answer):
        client.sendall(body)  # would fail, and the answer could be lost with it, if the server closed without listening
        assert answer.status == 413
        assert json.loads(answer.read())["error"]["code"] == "request_too_large"
        assert client.recv(1) == b"", "the connection ends once the body has"


def test_a_client_that_drips_a_refused_body_is_cut_off(
    serve: Any, cache: KVCache, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    monkeypatch.setattr("dynamo.serve.exchange._LINGER_S", 0.2)
    server = serve(cache=cache)
    with lookup_with_body(server, b"Content-Length: %d" % (1 << 40)) as (client, answer):
        assert answer.status == 413

        def is_cut_off() -> bool:
            try:
                client.sendall(b"x")
            except OSError:
                return True
            return False

        eventually(is_cut_off)


@contextlib.contextmanager
def lookup_with_body(server: Any, length: bytes) -> Iterator[tuple[socket.socket, http.client.HTTPResponse]]:
    """A request whose body is not sent yet, and its answer."""
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as client:
        client.sendall(
            b"POST /admin/cache/lookup HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%s\r\n\r\n"
            % length
        )
        with contextlib.closing(http.client.HTTPResponse(client)) as answer:
            answer.begin()
            yield client, answer


def test_wrong_methods_and_paths_are_told_apart(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    assert error_of(call(server, "GET", "/clear")) == (405, "method_not_allowed", None)
    assert error_of(call(server, "POST", "/nothing", {})) == (404, "unknown_url", None)
    assert error_of(call(server, "DELETE", "/pins/" + "x" * 5000)) == (404, "pin_not_found", "pin_id")


# --- what takes long


class Held:
    """Makes a method of a cache wait until told."""

    def __init__(self, cache: KVCache, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = threading.Event()
        self.proceed = threading.Event()
        self.num_ended = 0
        method = getattr(cache, name)

        def held(*arguments: Any, **options: Any) -> Any:
            self.started.set()
            assert self.proceed.wait(30)
            try:
                return method(*arguments, **options)
            finally:
                self.num_ended += 1

        monkeypatch.setattr(cache, name, held)


def test_long_operations_are_done_one_at_a_time_and_hold_nobody_else_up(
    serve: Any, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(cache=cache)
    held = Held(cache, "verify", monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(call, server, "POST", "/verify", {})
        assert held.started.wait(30)
        for path, body in (("/verify", {}), ("/clear", {"tier": "all"}), ("/resize", {"tier": "host", "size": 1})):
            response = call(server, "POST", path, body)
            assert error_of(response) == (409, "operation_in_progress", None)
            assert "verify is under way" in response.json()["error"]["message"]
        assert call(server, "POST", "/lookup", PROMPT).status_code == 200
        assert httpx.get(server.url + "/live").status_code == 200
        held.proceed.set()
        assert first.result(30).status_code == 200
    assert call(server, "POST", "/clear", {"tier": "device"}).status_code == 200


def test_an_operation_whose_client_left_comes_to_its_end(
    serve: Any, cache: KVCache, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    server = serve(cache=cache)
    held = Held(cache, "clear", monkeypatch)
    parts = urlsplit(server.url)
    body = b'{"tier":"all"}'
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as client:
        client.sendall(
            b"POST /admin/cache/clear HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert held.started.wait(30)
    status = 'dynamo_requests_total{endpoint="/admin/cache/clear",status="499"} 1.0'
    eventually(lambda: status in httpx.get(server.url + "/metrics").text)
    assert error_of(call(server, "POST", "/clear", {"tier": "all"})) == (409, "operation_in_progress", None)
    held.proceed.set()
    eventually(lambda: held.num_ended == 1)
    eventually(lambda: call(server, "POST", "/clear", {"tier": "all"}).status_code == 200)
    assert cache.lookup(list(TEXT.encode())).cached_tokens == 0


def test_a_deadline_that_passes_is_told_and_the_server_goes_on(
    serve: Any, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(cache=cache)
    monkeypatch.setattr("dynamo.serve.admin._GRACE_S", 0.0)
    held = Held(cache, "verify", monkeypatch)
    response = call(server, "POST", "/verify", {"timeout_s": 0.01})
    assert error_of(response) == (504, "deadline_exceeded", None)
    held.proceed.set()
    assert call(server, "GET", "").status_code == 200


def test_too_many_operations_are_a_429(
    serve: Any, cache: KVCache, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    server = serve(cache=cache)
    held = Held(cache, "lookup", monkeypatch)
    monkeypatch.setattr("dynamo.serve.admin._MAX_OPERATIONS", 6)
    with ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(call, server, "POST", "/lookup", PROMPT) for _ in range(12)]
        eventually(lambda: sum(done.done() for done in calls) == 6)
        held.proceed.set()
        responses = [done.result(30) for done in calls]
    assert sorted(response.status_code for response in responses) == [200] * 6 + [429] * 6
    refused = next(response for response in responses if response.status_code == 429)
    assert error_of(refused) == (429, "too_many_operations", None)
    assert int(refused.headers["retry-after"]) > 0


def test_draining_ends_and_refuses_operations(serve: Any, cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(cache=cache)
    held = Held(cache, "verify", monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call, server, "POST", "/verify", {})
        assert held.started.wait(30)
        server.call(server.frontend.begin_drain)
        assert error_of(running.result(30)) == (503, "shutting_down", None)
        assert error_of(call(server, "POST", "/lookup", PROMPT)) == (503, "shutting_down", None)
        held.proceed.set()


def test_a_closed_cache_is_a_503(serve: Any, cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(cache=cache)

    def closed(*_: Any, **__: Any) -> Any:
        raise CacheClosedError("the cache is closed")

    monkeypatch.setattr(cache, "lookup", closed)
    assert error_of(call(server, "POST", "/lookup", PROMPT)) == (503, "shutting_down", None)


def test_operations_and_requests_at_once_leave_the_books_balanced(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    prompts = [f"{number} {TEXT}" for number in range(8)]

    def work(number: int) -> int:
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/lookup", {"prompt": prompts[number]}),
            ("/prefetch", {"prompt": prompts[number]}),
            ("/pins", {"prompt": prompts[number], "ttl_s": 0.05, "tiers": ["device", "host", "disk"]}),
            ("/clear", {"tier": ("device", "host", "disk", "all")[number % 4]}),
            ("/verify", {"timeout_s": 5}),
        ]
        worst = 0
        for path, body in bodies * 3:
            worst = max(worst, call(server, "POST", path, body).status_code)
        return worst

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(work, number) for number in range(8)]
        for _ in range(10):
            for prompt in prompts:
                remember(cache, list(prompt.encode()))
        assert all(result.result(60) in (200, 409) for result in results)
    stats = cache.stats()
    assert stats.load_faults.keys() <= {"missing"}, "cleared between the look and the load"
    assert stats.verify_faults == {}


# --- the document


def test_the_document_lists_them_all(serve: Any, cache: KVCache) -> None:
    document = httpx.get(serve(cache=cache).url + "/openapi.json").json()
    assert document == openapi_document(admin=True)
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert {(operation.path, operation.method.lower()) for operation in OPERATIONS} <= described
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert references <= set(document["components"]["schemas"])


def test_answers_are_as_described(serve: Any, cache: KVCache) -> None:
    server = serve(cache=cache)
    document = openapi_document(admin=True)
    bodies = {
        "lookup": PROMPT,
        "explain": PROMPT,
        "prefetch": PROMPT,
        "pin": PROMPT,
        "clear": {"tier": "host"},
        "verify": {},
    }
    for operation in OPERATIONS:
        if operation.method == "GET" or operation.operation_id in bodies:
            answer = httpx.request(
                operation.method, server.url + operation.path, json=bodies.get(operation.operation_id), timeout=30
            )
            schema = document["paths"][operation.path][operation.method.lower()]["responses"]["200"]
            reference = schema["content"]["application/json"]["schema"]
            jsonschema.validate(answer.json(), {**reference, "components": document["components"]})
