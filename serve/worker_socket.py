"""The Unix socket at which fronts reach a worker, made anew where somebody removes it or the folder that it lies in."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from starlette.types import ASGIApp

from dynamo.serve.http_server import serving
from dynamo.serve.worker_claim import WorkerClaim

__all__ = ["reachable"]

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_BACKLOG = 64


@contextlib.asynccontextmanager
async def reachable(
    app: ASGIApp, claim: WorkerClaim, name_lost: Callable[[], None], *, look_s: float = _LOOK_S
) -> AsyncIterator[None]:
    """Serves at a worker's socket for as long as the block runs.

    Args:
        name_lost: called once, on the event loop, when the name is another worker's. No front can find this one any more;
            connections that there are go on.
        look_s: how often it is looked whether folder and socket are still there.

    Raises:
        OSError: the socket cannot be made.
    """
    path = claim.socket_path("http")
    with _listen(path) as listener:
        async with serving(app, listener):
            task = asyncio.create_task(_keep(app, claim, name_lost, look_s))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()) is not None:
                    logger.error("a socket of %s did not end well", claim.worker_id, exc_info=error)


async def _keep(app: ASGIApp, claim: WorkerClaim, name_lost: Callable[[], None], look_s: float) -> None:
    """Looks after the socket for ever, whatever goes wrong: without it no front would come back to this worker."""
    path = claim.socket_path("http")
    trouble = ""
    async with contextlib.AsyncExitStack() as stack:
        while True:
            await asyncio.sleep(look_s)
            try:
                if not await asyncio.to_thread(claim.renew):
                    logger.error(
                        "the name %s is another worker's: the discovery folder was removed, and that one was faster; this "
                        "one ends when no request runs any more",
                        claim.worker_id,
                    )
                    name_lost()
                    break
                if not await asyncio.to_thread(os.path.exists, path):
                    await stack.enter_async_context(_serving_anew(app, path))
                    logger.warning("the socket of %s was removed by somebody; it is made anew", claim.worker_id)
                trouble = ""
            except Exception as error:
                if trouble != (trouble := repr(error)):
                    logger.error(
                        "fronts cannot reach %s: %s",
                        claim.worker_id,
                        error,
                        exc_info=None if isinstance(error, OSError) else error,
                    )
        await asyncio.Event().wait()  # what was made anew serves those that are connected, until the block has run


@contextlib.asynccontextmanager
async def _serving_anew(app: ASGIApp, path: str) -> AsyncIterator[None]:
    with _listen(path) as listener:
        has_begun = False
        try:
            async with serving(app, listener):
                has_begun = True
                yield
        finally:
            if not has_begun:  # or it would be taken for a socket that serves
                _remove(path)


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        Path(path).chmod(0o600)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
