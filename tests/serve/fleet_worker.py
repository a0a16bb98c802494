"""A worker process without a command line: the mocker, registered in a folder. `fleet_worker.py FOLDER NAME`.

Steps take 10 ms. Says "ready" once it is registered, ends in order on SIGTERM.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import uvicorn

import dynamo.serve.demo
from dynamo.kvcache import KVCache
from dynamo.kvcache.event_publisher import EventPublisher
from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.router.workers import LoadReport, WorkerCard
from dynamo.serve.discovery import FolderDiscovery, Registration
from dynamo.serve.engine.mocker import MockTimings, build_mock_engine, mock_kv_spec
from dynamo.serve.engine.scheduler import SchedulerLimits
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.plane.worker_app import WorkerApp


class Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


async def main(folder: Path, name: str) -> None:
    epoch = time.time_ns()
    sockets = folder / f"{name}.{epoch}"
    sockets.mkdir(mode=0o700)
    cache = KVCache(mock_kv_spec("fleet", 16), device="cpu", device_blocks=512)
    engine = build_mock_engine(
        Tokenizer.from_folder(Path(dynamo.serve.demo.__file__).parent / "model"),
        cache,
        timings=MockTimings(prefill_tokens_per_s=1e6, step_s=0.01, token_s=0.0, speedup=1.0),
        max_model_len=4096,
        limits=SchedulerLimits(max_running=16, max_batch_tokens=512),
        max_waiting=64,
    )
    await engine.start()
    card = WorkerCard(
        worker_id=name,
        epoch=epoch,
        model="demo",
        fingerprint=cache.spec.fingerprint.hex(),
        hash_version=HASH_VERSION,
        block_size=cache.block_size,
    )

    def report() -> LoadReport:
        stats = engine.stats()
        return LoadReport(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            prefill_tokens_waiting=0,
            counters={"generated_tokens": stats.generated_tokens},
        )

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with EventPublisher(
        cache.event_log, epoch=epoch, endpoint=f"ipc://{sockets}/events", replay_endpoint=f"ipc://{sockets}/replay"
    ) as publisher:
        app = WorkerApp(engine, card, report=report, snapshot=cache.snapshot, publish_load=publisher.publish_load)
        server = Server(uvicorn.Config(app, uds=f"{sockets}/http", lifespan="off", ws="none", log_config=None))
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  # uvicorn tells of it in no other way
            await asyncio.sleep(0.01)
        registration = Registration(
            card=card,
            address=f"unix:{sockets}/http",
            events=publisher.endpoint,
            replay=publisher.replay_endpoint,
            pid=os.getpid(),
        )
        registered = await FolderDiscovery(folder).register(registration)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await stop.wait()
        await registered.close()
        app.begin_drain()
        await app.wait_idle(20)
        await app.close()
        server.should_exit = True
        await serving
    await engine.stop()


asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
