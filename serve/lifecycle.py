"""The server's process: socket first, then model, cache and engine, then requests, then an orderly end.

start    bind → load → start the engine → listen → banner
SIGTERM  /health says 503 and new requests get 503 → running ones finish, or are ended when the time is up
         → connections close → the engine stops, the cache is flushed → exit 0
again    running requests are ended at once → exit 1
"""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from prometheus_client.registry import Collector
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from dynamo.serve.admin import CacheAdmin
from dynamo.serve.banner import render_banner, server_url
from dynamo.serve.cache_metrics import CacheCollector
from dynamo.serve.cache_report import report_cache
from dynamo.serve.config import API_KEY_VARIABLE, Config, ServerSettings
from dynamo.serve.conflicts import describe_conflict
from dynamo.serve.errors import ConfigError
from dynamo.serve.frontend import Frontend
from dynamo.serve.key_log import KeyLog, check_key_log
from dynamo.serve.repetition import RepetitionFilter

if TYPE_CHECKING:
    from dynamo.serve.assembly import Assembly

__all__ = ["bind", "run_server"]

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_CLOSE_TIMEOUT_S = 5
_ABORT_TIMEOUT_S = 5.0


def run_server(config: Config) -> int:
    """Serves until told to stop; the process's exit code.

    Raises:
        ConfigError: settings do not fit the machine.
        ModelLoadError: the model folder cannot be loaded.
    """
    logging.basicConfig(
        level=config.server.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True
    )
    logging.getLogger("uvicorn.error").addFilter(RepetitionFilter())
    if config.server.log_level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    if (conflict := describe_conflict()) is not None:
        logger.warning(conflict)
    _check_openness(config.server)
    if config.server.key_log is not None:
        check_key_log(config.server.key_log)
    with bind(config.server) as listener:
        assembly = _load(config)
        _listen(listener, config.server)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(assembly, listener, config.server))


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
        raise ConfigError(f"--host {server.host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(server, error) from error
    return listener


def _listen(listener: socket.socket, server: ServerSettings) -> None:
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


def _check_openness(server: ServerSettings) -> None:
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


def _load(config: Config) -> "Assembly":
    # Brings torch, which takes seconds: a taken port is told before that.
    from dynamo.serve.assembly import build_engine

    console = Console(stderr=True)
    if not console.is_terminal:
        logger.info("loading %s", config.model.path)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading the model", total=1.0)
        assembly = build_engine(config, lambda share: progress.update(task, completed=share))
    allowed = assembly.engine.max_model_len
    if allowed < assembly.summary.max_model_len:
        logger.warning(
            "the device cache holds %d tokens, less than the model's context of %d: longer requests are refused; "
            "raise --device-cache to serve them",
            allowed,
            assembly.summary.max_model_len,
        )
    return assembly


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with a word when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


async def _serve(assembly: "Assembly", listener: socket.socket, config: ServerSettings) -> int:
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    forced = False
    async with contextlib.AsyncExitStack() as stack:  # what is entered last ends first
        collectors: list[Collector] = [CacheCollector(assembly.cache.stats)]
        if config.key_log is not None:
            key_log = await stack.enter_async_context(KeyLog(config.key_log, block_size=assembly.cache.block_size))
            assembly.engine.on_finished(key_log.record)
            collectors.append(key_log)
        stack.push_async_callback(assembly.engine.stop)
        await assembly.engine.start()
        await stack.enter_async_context(_reporting(assembly))
        admin = None
        if config.admin:
            admin = CacheAdmin(assembly.cache, assembly.served)
            stack.callback(admin.close)
        frontend = Frontend(
            assembly.engine, assembly.served, api_key=config.api_key, collectors=collectors, admin=admin
        )
        forced = await _serve_until_told(frontend, assembly, listener, config, signals)
    return 1 if forced else 0


async def _serve_until_told(
    frontend: Frontend,
    assembly: "Assembly",
    listener: socket.socket,
    config: ServerSettings,
    signals: "asyncio.Queue[int]",
) -> bool:
    """Prints the banner and serves; whether a second signal cut the end short."""
    async with _listening(frontend, listener) as server:
        url = server_url(config.host, listener.getsockname()[1])
        max_model_len = assembly.engine.max_model_len
        stats = assembly.cache.stats()
        banner = render_banner(assembly.summary, assembly.served.name, max_model_len, stats, config, url)
        Console().print(banner, highlight=False, markup=False, soft_wrap=True)
        await signals.get()
        forced = await _drain(frontend, signals, config.drain_timeout)
        server.force_exit = forced
    return forced


@contextlib.asynccontextmanager
async def _reporting(assembly: "Assembly") -> AsyncIterator[None]:
    """The cache's line in the log, for as long as the block runs."""
    task = asyncio.create_task(report_cache(assembly.cache.stats))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def _listening(frontend: Frontend, listener: socket.socket) -> AsyncIterator[_Server]:
    """uvicorn on `listener` for as long as the block runs; connections are closed at its end."""
    server = _Server(
        uvicorn.Config(
            frontend,
            http="httptools",
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
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve(sockets=[listener]))
        await server.listening.wait()
        try:
            yield server
        finally:
            server.should_exit = True
            await serving


async def _drain(frontend: Frontend, signals: "asyncio.Queue[int]", timeout_s: float) -> bool:
    """Ends all requests, in peace where there is time; whether a second signal cut it short."""
    frontend.begin_drain()
    logger.info("stopping: running requests have %g s; a second signal ends them at once", timeout_s)
    idle = asyncio.create_task(frontend.wait_idle(timeout_s))
    again = asyncio.create_task(signals.get())
    await asyncio.wait((idle, again), return_when=asyncio.FIRST_COMPLETED)
    forced = not idle.done()
    if forced or not idle.result():
        logger.warning("ending the requests that still run")
        frontend.abort_requests()
        await frontend.wait_idle(_ABORT_TIMEOUT_S)
    for task in (idle, again):
        task.cancel()
    await asyncio.gather(idle, again, return_exceptions=True)
    return forced
