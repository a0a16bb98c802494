"""A server of one process: socket first, then model, cache and engine, then requests, then an orderly end.

start    bind → load → start the engine → listen → banner
SIGTERM  /health says 503 and new requests get 503 → running ones finish, or are ended when the time is up
         → connections close → the engine stops, the cache is flushed → exit 0
again    running requests are ended at once → exit 1
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
from prometheus_client.registry import Collector
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from dynamo.serve.admin import CacheAdmin
from dynamo.serve.banner import render_banner, server_url
from dynamo.serve.cache_metrics import CacheCollector
from dynamo.serve.cache_report import report_cache
from dynamo.serve.config import Config, ServerSettings
from dynamo.serve.conflicts import describe_conflict
from dynamo.serve.frontend import Frontend
from dynamo.serve.http_server import (
    bind,
    check_openness,
    end_requests,
    listen,
    serving,
    set_up_logging,
    stop_signals,
    use_all_descriptors,
)
from dynamo.serve.key_log import KeyLog, check_key_log

if TYPE_CHECKING:
    from dynamo.serve.assembly import Assembly

__all__ = ["load_assembly", "run_server", "running"]

logger = logging.getLogger(__name__)


def run_server(config: Config) -> int:
    """Serves until told to stop; the process's exit code.

    Raises:
        ConfigError: settings do not fit the machine.
        ModelLoadError: the model folder cannot be loaded.
    """
    set_up_logging(config.server.log_level)
    use_all_descriptors()
    if (conflict := describe_conflict()) is not None:
        logger.warning(conflict)
    check_openness(config.server)
    if config.server.key_log is not None:
        check_key_log(config.server.key_log)
    with bind(config.server) as listener:
        assembly = load_assembly(config)
        listen(listener, config.server)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(assembly, listener, config.server))


def load_assembly(config: Config) -> "Assembly":
    """Loads the model and makes cache and engine, with a progress bar on a terminal.

    Raises:
        ConfigError: settings do not fit the model or the machine.
        ModelLoadError: the model folder cannot be loaded.
    """
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


@contextlib.asynccontextmanager
async def running(assembly: "Assembly", key_log_path: Path | None) -> AsyncIterator[list[Collector]]:
    """Runs the engine, with its key log and its line in the log, for as long as the block runs; gives what they count."""
    async with contextlib.AsyncExitStack() as stack:  # what is entered last ends first
        collectors: list[Collector] = [CacheCollector(assembly.cache.stats)]
        if key_log_path is not None:
            key_log = await stack.enter_async_context(KeyLog(key_log_path, block_size=assembly.cache.block_size))
            assembly.engine.on_finished(key_log.record)
            collectors.append(key_log)
        stack.push_async_callback(assembly.engine.stop)
        await assembly.engine.start()
        await stack.enter_async_context(_reporting(assembly))
        yield collectors


async def _serve(assembly: "Assembly", listener: socket.socket, config: ServerSettings) -> int:
    signals = stop_signals()
    async with running(assembly, config.key_log) as collectors:
        with contextlib.ExitStack() as stack:
            admin = None
            if config.admin:
                admin = CacheAdmin(assembly.cache, assembly.served)
                stack.callback(admin.close)
            frontend = Frontend(
                assembly.engine,
                assembly.served,
                api_key=config.api_key,
                collectors=collectors,
                admin=admin,
                stream_interval_s=config.stream_interval,
            )
            forced = await _serve_until_told(frontend, assembly, listener, config, signals)
    return 1 if forced else 0


async def _serve_until_told(
    frontend: Frontend,
    assembly: "Assembly",
    listener: socket.socket,
    config: ServerSettings,
    signals: asyncio.Queue[int],
) -> bool:
    """Prints the banner and serves; whether a second signal cut the end short."""
    async with serving(frontend, listener) as server:
        url = server_url(config.host, listener.getsockname()[1])
        max_model_len = assembly.engine.max_model_len
        stats = assembly.cache.stats()
        banner = render_banner(assembly.summary, assembly.served.name, max_model_len, stats, config, url)
        Console().print(banner, highlight=False, markup=False, soft_wrap=True)
        await signals.get()
        forced = await end_requests(frontend, signals, config.drain_timeout)
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
