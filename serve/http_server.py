"""Listening for HTTP, and the orderly end of it: what all serving processes do alike."""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import resource
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from enum import Enum
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from dynamo.serve.config import API_KEY_VARIABLE, ServerSettings
from dynamo.serve.errors import ConfigError
from dynamo.serve.frontend import Frontend
from dynamo.serve.http_protocol import BoundedProtocol
from dynamo.serve.repetition import RepetitionFilter

__all__ = [
    "Drain",
    "Drainable",
    "HttpServer",
    "bind",
    "check_openness",
    "drain",
    "end_requests",
    "listen",
    "serving",
    "set_up_logging",
    "stop_signals",
    "use_all_descriptors",
]

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_CLOSE_TIMEOUT_S = 5
_ABORT_TIMEOUT_S = 5.0
_COLLECT_AFTER = 20_000  # more objects than there were, instead of Python's 700: a single engine step makes hundreds


def use_all_descriptors() -> None:
    """Lets this process have as many open files as it may, since every client takes one and the usual soft limit is 1024.

    The soft limit exists for programs that use select(2), which this one does not
    (https://0pointer.net/blog/file-descriptor-limits.html).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # kernels differ in what they take for "unlimited"
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def set_up_logging(level: str) -> None:
    """The format of this process's log, on stderr, with uvicorn's part kept short.

    Args:
        level: "debug", "info", "warning" or "error".
    """
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True)
    logging.getLogger("uvicorn.error").addFilter(RepetitionFilter())
    if level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def stop_signals() -> asyncio.Queue[int]:
    """A queue of the SIGINT and SIGTERM that the running loop's process gets from now on."""
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    return signals


def bind(server: ServerSettings) -> socket.socket:
    """A socket on the configured address that does not listen yet, so that a taken port is known before the model loads.

    Raises:
        ConfigError: the address does not exist here or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"--host {server.host}: {error.strerror or error}; give an address or a name of this machine, such as 127.0.0.1, "
            "or 0.0.0.0 for all of them, and the port as --port"
        ) from error
    except UnicodeError as error:  # of the encoding of host names
        raise ConfigError(f"--host {server.host!r} is no address and no host name: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(server, error) from error
    return listener


def listen(listener: socket.socket, server: ServerSettings) -> None:
    """Has a bound socket take connections.

    Raises:
        ConfigError: another server took the address meanwhile.
    """
    try:
        listener.listen(_BACKLOG)
    except OSError as error:  # another server bound the same address, and listened, while the model was loading
        raise _cannot_listen(server, error) from error


def _cannot_listen(server: ServerSettings, error: OSError) -> ConfigError:
    ways_out = {
        errno.EADDRINUSE: "stop what uses it or choose another --port (0 takes a free one)",
        errno.EADDRNOTAVAIL: "give an address of this machine as --host, such as 127.0.0.1, or 0.0.0.0 for all of them",
        errno.EACCES: "choose a --port from 1024 up",
    }
    way_out = f"; {ways_out[error.errno]}" if error.errno in ways_out else ""
    return ConfigError(f"cannot listen on {server.host}:{server.port}: {error.strerror or error}{way_out}")


def check_openness(server: ServerSettings) -> None:
    """Warns of a server that everybody may use.

    Raises:
        ConfigError: everybody could administer it.
    """
    if server.api_key is not None:
        return
    try:
        loopback = ipaddress.ip_address(server.host).is_loopback
    except ValueError:
        loopback = server.host == "localhost"
    if not loopback:
        if server.admin:
            raise ConfigError(
                f"--admin with --host {server.host} would let other machines administer the cache; "
                f"set a key with --api-key or {API_KEY_VARIABLE}, or listen on 127.0.0.1"
            )
        logger.warning("--host %s lets other machines in, and without --api-key everybody who reaches it", server.host)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, and with a word when it listens.

    Attributes:
        listening: set when connections are taken.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket) -> AsyncIterator[HttpServer]:
    """uvicorn on `listener` for as long as the block runs; connections are closed at its end."""
    server = HttpServer(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listener]))
    task.add_done_callback(lambda done: server.listening.set())  # nobody waits for one that failed
    try:
        await server.listening.wait()
        if task.done():
            raise RuntimeError("the HTTP server ended before it listened")
        with _seldom_collecting():
            yield server
    finally:
        server.should_exit = True
        await task


@contextlib.contextmanager
def _seldom_collecting() -> Iterator[None]:
    """Has the garbage collector leave alone what there is now, and look seldom: it took an eighth of a busy front's time."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class Drainable(Protocol):
    """An application whose requests end before the process does."""

    def begin_drain(self) -> None:
        """New requests are refused from now on."""
        ...

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until none runs; False when the time was not enough."""
        ...


class Drain(Enum):
    """How a drain came to its end; not all requests have ended unless it is IDLE."""

    IDLE = "idle"
    LATE = "late"
    FORCED = "forced"


async def drain(app: Drainable, signals: asyncio.Queue[int], timeout_s: float) -> Drain:
    """Lets the requests that run come to their end: until the time is up, or there is another signal."""
    app.begin_drain()
    logger.info("stopping: running requests have %g s; a second signal ends them at once", timeout_s)
    idle = asyncio.create_task(app.wait_idle(timeout_s))
    again = asyncio.create_task(signals.get())
    await asyncio.wait((idle, again), return_when=asyncio.FIRST_COMPLETED)
    outcome = Drain.FORCED if not idle.done() else Drain.IDLE if idle.result() else Drain.LATE
    for task in (idle, again):
        task.cancel()
    await asyncio.gather(idle, again, return_exceptions=True)
    return outcome


async def end_requests(frontend: Frontend, signals: asyncio.Queue[int], timeout_s: float) -> bool:
    """Drains a front and ends what is left with an error its clients can read; whether a second signal cut it short."""
    outcome = await drain(frontend, signals, timeout_s)
    if outcome is not Drain.IDLE:
        logger.warning("ending the requests that still run")
        frontend.abort_requests()
        await frontend.wait_idle(_ABORT_TIMEOUT_S)
    return outcome is Drain.FORCED
