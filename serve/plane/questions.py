"""What a front asks a worker beside the session: each question an exchange of its own, with a limit of time and size."""

import asyncio
from typing import Final

import aiohttp

from dynamo.kvcache.event_wire import MAX_SNAPSHOT_BYTES, SnapshotMessage, decode_snapshot
from dynamo.serve.errors import WorkerLostError

__all__ = ["fetch_metrics", "fetch_snapshot", "request_drain", "worker_client"]

_MAX_METRICS_BYTES: Final = 4 << 20
_METRICS_TIMEOUT_S: Final = 2.0  # well below the 10 s that a scraper grants


def worker_client(address: str, key: str = "") -> aiohttp.ClientSession:
    """A client of one worker; whoever asks for it closes it.

    Args:
        address: "unix:PATH" or "http://HOST:PORT".
        key: what the worker asks for; empty for nothing.

    Raises:
        ValueError: the address is neither.
    """
    connector: aiohttp.BaseConnector
    if address.startswith("unix:/"):
        connector = aiohttp.UnixConnector(address.removeprefix("unix:"), force_close=True)
        base = "http://worker"
    elif address.startswith("http://"):
        connector = aiohttp.TCPConnector(force_close=True)
        base = address
    else:
        raise ValueError(f"a worker's address is unix:/PATH or http://HOST:PORT, not {address!r}")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=None)  # the session lasts for ever; what must not has a limit of its own
    return aiohttp.ClientSession(base, connector=connector, headers=headers, timeout=timeout)


async def fetch_snapshot(address: str, worker_id: str, key: str = "", timeout_s: float = 30.0) -> SnapshotMessage:
    """What the worker's tiers hold now.

    Raises:
        WorkerLostError: it does not answer in time, or with something else.
        EventWireError: the snapshot cannot be read.
    """
    async with worker_client(address, key) as client:
        body = await _fetch(client, "/snapshot", worker_id, "its snapshot", MAX_SNAPSHOT_BYTES, timeout_s)
    return await asyncio.to_thread(decode_snapshot, memoryview(body))


async def fetch_metrics(address: str, worker_id: str, key: str = "", timeout_s: float = _METRICS_TIMEOUT_S) -> bytes:
    """The worker's page for Prometheus.

    Raises:
        WorkerLostError: it does not answer in time, with something else, or with too much.
    """
    async with worker_client(address, key) as client:
        return bytes(await _fetch(client, "/metrics", worker_id, "its metrics page", _MAX_METRICS_BYTES, timeout_s))


async def request_drain(address: str, worker_id: str, key: str = "", timeout_s: float = 5.0) -> None:
    """Asks a worker to take nothing new, and to leave when it has nothing any more.

    Raises:
        WorkerLostError: it does not answer in time, or with something else.
    """
    async with worker_client(address, key) as client:
        try:
            async with asyncio.timeout(timeout_s), client.post("/drain") as response:
                if response.status != 202:
                    raise WorkerLostError(worker_id, f"it answered {response.status} when asked to drain")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise WorkerLostError(worker_id, f"it cannot be asked to drain: {error!r}") from error


async def _fetch(
    client: aiohttp.ClientSession, path: str, worker_id: str, what: str, max_bytes: int, timeout_s: float
) -> bytearray:
    """The page at `path`, which messages call `what`.

    Raises:
        WorkerLostError: it does not come in time, or is too large.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s), client.get(path) as response:
            if response.status != 200:
                raise WorkerLostError(worker_id, f"it answered {response.status} when asked for {what}")
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > max_bytes:
                    raise WorkerLostError(worker_id, f"{what} has more than {max_bytes} bytes")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise WorkerLostError(worker_id, f"{what} cannot be fetched: {error!r}") from error
    return body
