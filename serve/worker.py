"""A worker process: an engine over a cache, behind a Unix socket, registered where fronts look for workers.

start    claim a name → load → start the engine → publish events → listen → register
SIGTERM  unregister, and tell the fronts → running requests finish, or fronts carry them on elsewhere when the time is up
         → the engine stops, the cache is flushed → exit 0
again    running requests are carried on elsewhere at once → exit 1

A dead engine ends the process with 1, so that whoever supervises it starts another.
"""

import asyncio
import logging
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import uvloop

from dynamo.kvcache.event_publisher import EventPublisher
from dynamo.serve.config import Config
from dynamo.serve.discovery import Discovery, FolderDiscovery, Registration
from dynamo.serve.errors import EngineDeadError
from dynamo.serve.http_server import Drain, drain, set_up_logging, stop_signals, use_all_descriptors
from dynamo.serve.key_log import check_key_log
from dynamo.serve.lifecycle import load_assembly, running
from dynamo.serve.lifeline import hold_on
from dynamo.serve.metrics import EngineCollector
from dynamo.serve.plane.worker_app import WorkerApp
from dynamo.serve.worker_claim import WorkerClaim
from dynamo.serve.worker_report import load_report, worker_card
from dynamo.serve.worker_socket import reachable

if TYPE_CHECKING:
    from dynamo.serve.assembly import Assembly

__all__ = ["run_worker"]

logger = logging.getLogger(__name__)

_HEALTH_S = 0.5
_FLUSH_TIMEOUT_S = 20.0


def run_worker(config: Config) -> int:
    """Computes for fronts until told to stop; the process's exit code.

    Raises:
        ConfigError: settings do not fit the machine, or the name is taken.
        ModelLoadError: the model folder cannot be loaded.
    """
    set_up_logging(config.server.log_level)
    use_all_descriptors()
    hold_on(config.server.drain_timeout + _FLUSH_TIMEOUT_S)
    assert config.fleet.discovery is not None, "checked with the command line"
    discovery = FolderDiscovery(config.fleet.discovery)
    with WorkerClaim.take(config.fleet.discovery, config.fleet.worker_id) as claim:
        config = _own_places(config, claim.worker_id)
        if config.server.key_log is not None:
            check_key_log(config.server.key_log)
        assembly = load_assembly(config)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(assembly, claim, discovery, config))


def _own_places(config: Config, worker_id: str) -> Config:
    """The settings with files of this worker's own, as several workers are given the same ones."""
    place, key_log = config.cache.disk_cache, config.server.key_log
    if place is not None:
        config = replace(config, cache=replace(config.cache, disk_cache=place.below(worker_id)))
    if key_log is not None:
        config = replace(
            config, server=replace(config.server, key_log=key_log.with_name(f"{key_log.name}.{worker_id}"))
        )
    return config


async def _serve(assembly: "Assembly", claim: WorkerClaim, discovery: Discovery, config: Config) -> int:
    signals = stop_signals()
    engine, cache = assembly.engine, assembly.cache
    epoch = time.time_ns()
    async with running(assembly, config.server.key_log) as collectors:
        with EventPublisher(
            cache.event_log,
            epoch=epoch,
            endpoint=f"ipc://{claim.socket_path('events')}",
            replay_endpoint=f"ipc://{claim.socket_path('replay')}",
        ) as publisher:
            app = WorkerApp(
                engine,
                worker_card(
                    cache, engine, config.engine, worker_id=claim.worker_id, epoch=epoch, model=assembly.served.name
                ),
                report=lambda: load_report(cache, engine),
                snapshot=cache.snapshot,
                publish_load=publisher.publish_load,
                collectors=[EngineCollector(engine), *collectors],
            )
            registration = Registration(
                card=app.card,
                address=f"unix:{claim.socket_path('http')}",
                events=publisher.endpoint,
                replay=publisher.replay_endpoint,
                pid=os.getpid(),
            )
            async with reachable(app, claim, name_lost=app.begin_drain):
                return await _serve_until_told(app, discovery, registration, signals, config.server.drain_timeout)


async def _serve_until_told(
    app: WorkerApp,
    discovery: Discovery,
    registration: Registration,
    signals: asyncio.Queue[int],
    drain_timeout_s: float,
) -> int:
    registered = await discovery.register(registration)
    try:
        logger.info("%s is ready and registered, %s", app.card.worker_id, registration.address)
        has_died = await _until_told(app, signals)
    finally:
        await registered.close()
    try:
        if has_died:
            return 1
        return 1 if await drain(app, signals, drain_timeout_s) is Drain.FORCED else 0
    finally:
        await app.close()


async def _until_told(app: WorkerApp, signals: asyncio.Queue[int]) -> bool:
    """Waits for a signal or for a request to drain, or until the engine has died; whether it has."""
    told = asyncio.create_task(signals.get())
    asked = asyncio.create_task(app.drain_requested.wait())
    try:
        while not (await asyncio.wait((told, asked), timeout=_HEALTH_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            try:
                app.engine.check_healthy()
            except EngineDeadError as error:
                logger.error("the engine is dead, and this process ends: %s", error)
                return True
        return False
    finally:
        for task in (told, asked):
            task.cancel()
        await asyncio.gather(told, asked, return_exceptions=True)
