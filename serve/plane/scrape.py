"""Asking a worker for its metrics."""

import asyncio
from typing import Final

import aiohttp

from dynamo.serve.errors import WorkerLostError
from dynamo.serve.plane.session import worker_client

__all__ = ["fetch_metrics"]

_MAX_BYTES: Final = 4 << 20
_TIMEOUT_S: Final = 2.0  # well below the 10 s that a scraper grants


async def fetch_metrics(address: str, worker_id: str, key: str = "", timeout_s: float = _TIMEOUT_S) -> bytes:
    """The worker's page for Prometheus.

    Raises:
        WorkerLostError: it does not answer in time, with something else, or with too much.
    """
    body = bytearray()
    async with worker_client(address, key) as client:
        try:
            async with asyncio.timeout(timeout_s), client.get("/metrics") as response:
                if response.status != 200:
                    raise WorkerLostError(worker_id, f"it answered {response.status} when asked for its metrics")
                async for piece in response.content.iter_any():
                    body += piece
                    if len(body) > _MAX_BYTES:
                        raise WorkerLostError(worker_id, f"its metrics have more than {_MAX_BYTES} bytes")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise WorkerLostError(worker_id, f"its metrics cannot be fetched: {error!r}") from error
    return bytes(body)
