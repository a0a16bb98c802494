"""Prefixes come back from every tier, through the real server: same text, exact counts."""

import random

import pytest

LENGTH = 1500
CACHED = (LENGTH - 1) // 16 * 16
ALWAYS_LOAD = ("--load-patience", "off")  # what is loaded is counted below, however busy the machine


def prompt(seed: int, length: int = LENGTH) -> list[int]:
    return [0, *random.Random(seed).choices(range(300, 2048), k=length - 1)]


def cached_tokens(answer: dict) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def text(answer: dict) -> str:
    return answer["choices"][0]["text"]


def hits(server, tier: str) -> float:
    return server.metrics()[f'dynamo_kvcache_hit_blocks_total{{tier="{tier}"}}']


@pytest.mark.slow
def test_a_prefix_comes_back_from_device_host_disk_and_after_kill_9(start, folder):
    flags = [*ALWAYS_LOAD, "--device-cache", "4MiB", "--max-model-len", "2000", "--disk-cache", f"{folder}:64MiB"]
    server = start(*flags, "--host-cache", "32MiB")
    first = server.complete(prompt(1))
    assert cached_tokens(first) == 0
    assert first["usage"]["prompt_tokens"] == LENGTH
    again = server.complete(prompt(1))
    assert (cached_tokens(again), text(again)) == (CACHED, text(first))
    assert hits(server, "device") == CACHED // 16

    for seed in range(2, 5):
        assert cached_tokens(server.complete(prompt(seed))) == 0
    from_host = server.complete(prompt(1))
    assert (cached_tokens(from_host), text(from_host)) == (CACHED, text(first))
    assert hits(server, "host") == CACHED // 16
    server.settle()
    server.server.kill()

    small = start(*flags, "--host-cache", "1MiB")
    from_disk = small.complete(prompt(1))
    assert (cached_tokens(from_disk), text(from_disk)) == (CACHED, text(first))
    assert hits(small, "disk") == CACHED // 16
    for seed in range(12, 15):
        assert cached_tokens(small.complete(prompt(seed))) == 0
    again = small.complete(prompt(1))
    assert (cached_tokens(again), text(again)) == (CACHED, text(first))
    assert small.server.stop() == 0


@pytest.mark.slow
def test_a_conversation_continues_in_the_cache(start, folder):
    server = start(*ALWAYS_LOAD, "--disk-cache", f"{folder}:64MiB")
    messages = [{"role": "user", "content": "What does os.path.join do? " * 8}]
    before = 0
    for _ in range(4):
        answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 40, "seed": 1})
        assert cached_tokens(answer) >= before // 16 * 16
        before = answer["usage"]["prompt_tokens"]
        messages.append(answer["choices"][0]["message"])
        messages.append({"role": "user", "content": "And then?"})


@pytest.mark.slow
def test_equal_prompts_of_different_salts_share_nothing(start, folder):
    server = start(*ALWAYS_LOAD, "--disk-cache", f"{folder}:64MiB")
    for salt in ("alice", "bob"):
        assert cached_tokens(server.complete(prompt(3, 200), cache_salt=salt)) == 0
        assert cached_tokens(server.complete(prompt(3, 200), cache_salt=salt)) == 192
