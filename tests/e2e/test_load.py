"""A thousand requests, many of whose clients leave in the middle: nothing leaks, nothing fails."""

import asyncio
import contextlib
import gc
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import uvicorn

from dynamo.serve.assembly import build_engine
from dynamo.serve.command_line import parse_command_line
from dynamo.serve.frontend import Frontend

NUM_REQUESTS = 1000
CONCURRENCY = 64


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


async def request(port: int, rng: random.Random) -> str:
    """One streamed request; returns "done", "left" for a client that went away early, or the error."""
    body = {
        "model": "demo",
        "prompt": [0, *rng.choices(range(300, 310), k=rng.randrange(1, 200))],
        "stream": True,
        "max_tokens": rng.randrange(1, 20),
        "n": rng.choice([1, 1, 1, 2]),
        "temperature": rng.choice([0, 0.8]),
        "ignore_eos": True,
    }
    leaves_after = rng.choice([None, None, 0, 200, 2000])
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
        )
        await writer.drain()
        received = b""
        while chunk := await asyncio.wait_for(reader.read(65536), timeout=60):
            received += chunk
            if leaves_after is not None and len(received) > leaves_after:
                return "left"
        complete = received.startswith(b"HTTP/1.1 200") and b'data: {"error"' not in received
        if not complete or b"data: [DONE]" not in received:
            return received.decode(errors="replace")
        return "done"
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def run_load(port: int, num_requests: int, seed: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    seeds = iter(range(seed, seed + num_requests))

    async def client() -> None:
        for number in seeds:
            outcomes[await request(port, random.Random(number))] += 1

    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    return outcomes


def is_quiet(assembly) -> bool:
    stats = assembly.engine.stats()
    return not (stats.num_running or stats.num_waiting or assembly.cache.stats().num_open_sequences)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_thousand_requests_with_random_disconnects_leak_nothing(tmp_path, eventually):
    flags = ["--device-cache", "12MiB", "--host-cache", "16MiB", "--max-model-len", "300", "--disk-cache"]
    config = parse_command_line([*flags, f"{tmp_path}:32MiB"]).loaded.config
    assembly = build_engine(config, lambda share: None)

    async def scenario() -> tuple[Counter[str], int]:
        await assembly.engine.start()
        server = uvicorn.Server(
            uvicorn.Config(Frontend(assembly.engine, assembly.served), port=0, log_config=None, lifespan="off")
        )
        serving = asyncio.create_task(server.serve())
        await asyncio.to_thread(eventually, lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            outcomes = await run_load(port, NUM_REQUESTS // 3, seed=0)
            gc.collect()
            before = resident_bytes()
            outcomes += await run_load(port, NUM_REQUESTS - NUM_REQUESTS // 3, seed=10_000)
            await asyncio.to_thread(eventually, lambda: is_quiet(assembly))
            gc.collect()
            grown = resident_bytes() - before
            await asyncio.to_thread(assembly.cache.flush)
            assembly.cache.check_invariants()
            assert assembly.cache.stats().tier("device").num_pinned_blocks == 0
        finally:
            server.should_exit = True
            await serving
            await assembly.engine.stop()
        return outcomes, grown

    outcomes, grown = asyncio.run(scenario())
    assert set(outcomes) == {"done", "left"}, outcomes
    assert outcomes.total() == NUM_REQUESTS
    assert grown < 32 << 20, f"memory grew by {grown >> 20} MiB over {NUM_REQUESTS * 2 // 3} requests"
