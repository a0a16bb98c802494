from typing import Any

import aiohttp
import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dynamo.kvcache.events import Snapshot
from dynamo.kvcache.hashing import block_keys, chain_root
from dynamo.serve.errors import WorkerLostError
from dynamo.serve.plane.questions import fetch_snapshot, worker_client

KEYS = block_keys(list(range(40)), 4, chain_root(b"model", 4))


class OneGauge(Collector):
    def collect(self) -> Any:
        yield GaugeMetricFamily("dynamo_test", "Of a test.", 4)


async def get(client: aiohttp.ClientSession, path: str, method: str = "GET") -> tuple[int, str]:
    async with client.request(method, path) as response:
        return response.status, await response.text()


def test_it_says_of_itself_what_is_asked(plane: Any, scripted: Any, run: Any) -> None:
    engine = scripted()

    async def test() -> None:
        async with (
            plane.worker(engine, collectors=[OneGauge()]) as (app, address),
            worker_client(address) as client,
        ):
            status, card = await get(client, "/card")
            assert status == 200
            assert '"worker_id":"worker-0"' in card
            assert await get(client, "/health") == (200, '{"status":"ready"}')
            assert "dynamo_test 4.0" in (await get(client, "/metrics"))[1]
            assert (await get(client, "/nothing"))[0] == 404
            assert (await get(client, "/drain", "POST"))[0] == 202
            assert app.drain_requested.is_set()
            assert await get(client, "/health") == (503, '{"status":"draining"}')
            engine.dead = True
            assert await get(client, "/health") == (503, '{"status":"dead"}')

    run(test())


def test_its_snapshot_is_what_the_cache_holds(plane: Any, scripted: Any, run: Any) -> None:
    snapshot = Snapshot(sequence_number=12, keys={"device": KEYS[:6], "host": KEYS[3:], "disk": []})

    async def test() -> None:
        async with plane.worker(scripted(), snapshot=lambda: snapshot, key="k") as (_, address):
            message = await fetch_snapshot(address, "worker-0", "k")
            assert (message.epoch, message.log_number) == (7, 12)
            los = [int.from_bytes(key[:8], "little") for key in KEYS]
            assert {tier: list(keys) for tier, keys in message.held.items()} == {
                "device": los[:6],
                "host": los[3:],
                "disk": [],
            }
            with pytest.raises(WorkerLostError, match="answered 401"):
                await fetch_snapshot(address, "worker-0")
        with pytest.raises(WorkerLostError, match="cannot be fetched"):
            await fetch_snapshot(address, "worker-0")

    run(test())


def test_a_worker_without_events_has_no_snapshot(plane: Any, scripted: Any, run: Any) -> None:
    async def test() -> None:
        async with plane.worker(scripted()) as (_, address):
            with pytest.raises(WorkerLostError, match="answered 404"):
                await fetch_snapshot(address, "worker-0")

    run(test())
