"""The process of a front, which computes nothing and loads no torch; with `--workers`, also the supervisor of those.

start    bind → read the model's folder → start workers → listen → wait for all of them → banner
SIGTERM  /health says 503 and new requests get 503 → running ones finish, or are ended when the time is up
         → connections close → workers drain and end → exit 0
again    running requests are ended at once, and workers get only the time to write their caches' rest → exit 1

A front alone has its banner at once, and is ready, as /health tells, with its first worker.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client.registry import Collector
from rich.console import Console

from dynamo.router.router import Router
from dynamo.router.waiting import WaitingRoom
from dynamo.serve.banner import render_fleet_banner, server_url
from dynamo.serve.config import Config, LoadedConfig
from dynamo.serve.conflicts import describe_conflict
from dynamo.serve.discovery import FolderDiscovery
from dynamo.serve.engine.model_folder import TextModel, read_text_model
from dynamo.serve.engine.request import SamplingDefaults
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.errors import ConfigError
from dynamo.serve.external import ExternalWorker
from dynamo.serve.external_member import ExternalServer
from dynamo.serve.fleet import Fleet
from dynamo.serve.fleet_settings import router_config
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
from dynamo.serve.migration import RoutedEngine
from dynamo.serve.model_place import find_model
from dynamo.serve.private_folder import private_folder
from dynamo.serve.router_metrics import RouterCollector
from dynamo.serve.served_model import MOCK_MAX_MODEL_LEN, ServedModel
from dynamo.serve.supervisor import Supervisor
from dynamo.serve.worker_claim import any_worker_in
from dynamo.serve.worker_commands import worker_commands

__all__ = ["read_model", "run_front"]

_OWN_DISCOVERY = "workers"
_LOOK_S = 0.1
_FIRST_LOOK_S = 0.5

logger = logging.getLogger(__name__)


def run_front(loaded: LoadedConfig) -> int:
    """Serves clients until told to stop; the process's exit code.

    Raises:
        ConfigError: settings do not fit the machine.
        ModelLoadError: the model folder cannot be read.
        WorkerStartError: the workers do not start, or none of them can be kept running.
    """
    config = loaded.config
    set_up_logging(config.server.log_level)
    use_all_descriptors()
    if (conflict := describe_conflict()) is not None:
        logger.warning(conflict)
    check_openness(config.server)
    with bind(config.server) as listener, contextlib.ExitStack() as stack:
        name, text = read_model(config)
        listen(listener, config.server)
        supervisor = None
        directory = config.fleet.discovery
        if config.fleet.workers is not None:
            folder = stack.enter_context(private_folder(lambda left: any_worker_in(left / _OWN_DISCOVERY)))
            directory = directory or folder / _OWN_DISCOVERY
            supervisor = Supervisor(worker_commands(loaded, folder, directory))
        front = _Front(config, name, text, directory, supervisor)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(front.serve(listener))


def read_model(config: Config) -> tuple[str, TextModel]:
    """What a front knows of its model without its workers: its name and its text.

    Raises:
        ConfigError: there is no such folder, or --max-model-len is more than the model's.
        ModelLoadError: the folder cannot be read.
    """
    folder, default_name = find_model(config.model.path)
    name = config.model.served_model_name or default_name
    wanted = config.model.max_model_len
    if config.engine.engine == "mocker":
        tokenizer = Tokenizer.from_folder(folder)
        limit = wanted or MOCK_MAX_MODEL_LEN
        return name, TextModel(tokenizer=tokenizer, sampling_defaults=SamplingDefaults(), max_model_len=limit)
    text = read_text_model(folder)
    if wanted is not None and wanted > text.max_model_len:
        raise ConfigError(f"--max-model-len {wanted} is more than the model's {text.max_model_len}")
    return name, replace(text, max_model_len=wanted or text.max_model_len)


class _Front:
    """One front, from its start to its end, on one event loop.

    Args:
        directory: where its workers register; None: it has external ones only.
        supervisor: of its own workers; None: it has none.
    """

    def __init__(
        self, config: Config, name: str, text: TextModel, directory: Path | None, supervisor: Supervisor | None
    ) -> None:
        self._config = config
        self._text = text
        self._served = ServedModel(
            name=name, codec=text.tokenizer, max_model_len=text.max_model_len, defaults=text.sampling_defaults
        )
        self._supervisor = supervisor
        self._is_forced = False
        front_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._router = Router(router_config(config.router, front_id))
        self._fleet = Fleet(
            None if directory is None else FolderDiscovery(directory),
            self._router,
            model=name,
            external=_external_servers(config, text),
        )

    async def serve(self, listener: socket.socket) -> int:
        """Runs it; the process's exit code.

        Raises:
            WorkerStartError: see `run_front`.
        """
        signals = stop_signals()
        room = WaitingRoom(self._router)
        migration_limit = self._config.router.migration_limit
        engine = RoutedEngine(
            self._fleet,
            self._router,
            room,
            max_model_len=self._text.max_model_len,
            block_size=self._config.cache.block_size,
            migration_limit=migration_limit,
            no_worker_timeout_s=self._config.router.no_worker_timeout,
        )
        async with contextlib.AsyncExitStack() as stack:  # what is entered last ends first
            collectors: list[Collector] = [
                RouterCollector(
                    self._router.stats,
                    room.stats,
                    self._fleet.stats,
                    engine.migrations,
                    migration_limit=migration_limit,
                )
            ]
            if self._supervisor is not None:
                collectors.append(self._supervisor)
                stack.push_async_callback(self._stop_workers, self._supervisor, signals)
                await self._supervisor.start()
            stack.push_async_callback(engine.stop)
            await engine.start()
            await stack.enter_async_context(self._following())
            self._is_forced = await self._serve_until_told(engine, collectors, listener, signals)
        return 1 if self._is_forced else 0

    async def _serve_until_told(
        self,
        engine: RoutedEngine,
        collectors: Sequence[Collector],
        listener: socket.socket,
        signals: asyncio.Queue[int],
    ) -> bool:
        """Serves; whether a second signal cut the end short."""
        server_settings = self._config.server
        frontend = Frontend(
            engine,
            self._served,
            api_key=server_settings.api_key,
            collectors=collectors,
            routed=engine,
            stream_interval_s=server_settings.stream_interval,
        )
        async with serving(frontend, listener) as server:
            if await self._are_ready(signals):
                url = server_url(server_settings.host, listener.getsockname()[1])
                model, cards = self._config.model.path, self._fleet.ready_cards()
                banner = render_fleet_banner(model, self._served, cards, server_settings, url)
                Console().print(banner, highlight=False, markup=False, soft_wrap=True)
                await self._unless_failed(signals.get())
            forced = await end_requests(frontend, signals, server_settings.drain_timeout)
            server.force_exit = forced
        return forced

    async def _are_ready(self, signals: asyncio.Queue[int]) -> bool:
        """Waits for all workers of this process; False when a signal came before. A front alone only looks who is there."""
        if self._supervisor is None:
            await self._fleet.wait_ready(_FIRST_LOOK_S)
            return True
        told = asyncio.create_task(signals.get())
        ready = asyncio.create_task(self._workers_ready(self._supervisor))
        try:
            await self._unless_failed(asyncio.wait((told, ready), return_when=asyncio.FIRST_COMPLETED))
            if not ready.done():
                return False
            self._supervisor.establish()
            return True
        finally:
            for task in (told, ready):
                task.cancel()
            await asyncio.gather(told, ready, return_exceptions=True)

    async def _workers_ready(self, supervisor: Supervisor) -> None:
        while not supervisor.are_all_ready:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(_LOOK_S)

    async def _unless_failed(self, waiting: Coroutine[Any, Any, object]) -> None:
        """Waits for something.

        Raises:
            WorkerStartError: the workers are given up first.
        """
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(waiting)]
        if self._supervisor is not None:
            tasks.append(asyncio.create_task(self._supervisor.failed()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise tasks[1].result()
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _following(self) -> AsyncIterator[None]:
        """Has the front follow what its workers are, for as long as the block runs."""
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            cards = self._fleet.ready_cards()
            if cards:
                own = self._text.max_model_len
                # A worker that takes less is not asked for more, so that the longest counts. Some do not say.
                self._served.max_model_len = min(own, max(card.max_model_len or own for card in cards))
            if self._supervisor is not None:
                for worker_id, pid in self._fleet.ready_processes().items():
                    self._supervisor.mark_ready(worker_id, pid)
            await asyncio.sleep(_LOOK_S)

    async def _stop_workers(self, supervisor: Supervisor, signals: asyncio.Queue[int]) -> None:
        """Workers may still serve other fronts, so they get their time; another signal ends it, and so did one before."""
        drain_timeout_s = 0.0 if self._is_forced else self._config.server.drain_timeout
        stopping = asyncio.create_task(supervisor.stop(drain_timeout_s))
        again = asyncio.create_task(signals.get())
        await asyncio.wait((stopping, again), return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            supervisor.signal(signal.SIGKILL)
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
        await stopping


def _external_servers(config: Config, text: TextModel) -> list[ExternalServer]:
    sources = config.fleet.kv_events or (None,) * len(config.fleet.external)
    return [
        ExternalServer(
            link=ExternalWorker(
                f"external-{number}",
                url,
                text.tokenizer,
                eos_token_ids=text.tokenizer.eos_token_ids,
                max_model_len=text.max_model_len,
            ),
            events=None if source is None else source.endpoint,
            replay=None if source is None else source.replay,
            block_size=config.cache.block_size,
        )
        for number, (url, source) in enumerate(zip(config.fleet.external, sources, strict=True))
    ]
