"""How the workers of `--workers N` are started: with the server's own settings, a device or a share of the cores each."""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dynamo.serve.config import API_KEY_VARIABLE, LoadedConfig, render_toml
from dynamo.serve.supervisor import WorkerCommand

__all__ = ["count_gpus", "worker_commands", "worker_name"]

_GPU = re.compile(r"nvidia\d+")


def worker_commands(
    loaded: LoadedConfig, folder: Path, discovery: Path, environ: Mapping[str, str] = os.environ
) -> list[WorkerCommand]:
    """A command for each worker, with the settings it finds in `folder`.

    Sizes are each worker's, but the default of the disk tier leaves room for others: they share that.

    The key that clients send is not among the settings, and not in the workers' environment either: no client reaches them.

    Args:
        folder: this process's own; the workers read it while they start.
        discovery: where they register.
    """
    config = loaded.config
    count = config.fleet.workers
    assert count is not None, "checked with the command line"
    place = config.cache.disk_cache
    if place is not None and "cache.disk_cache" not in loaded.sources:
        share = replace(place, capacity_bytes=place.capacity_bytes // count)
        config = replace(config, cache=replace(config.cache, disk_cache=share))
    num_gpus = 0 if config.model.device is not None else count_gpus(environ)
    if not num_gpus:
        threads = max(1, config.engine.threads // count)
        config = replace(config, engine=replace(config.engine, threads=threads))
    file = folder / "workers.toml"
    files = {file: render_toml(LoadedConfig(config, {}))}
    environment = {name: value for name, value in environ.items() if name != API_KEY_VARIABLE}
    program = (
        sys.executable,
        "-P",
        "-m",
        "dynamo.serve",
        "worker",
        "--config",
        str(file),
        "--discovery",
        str(discovery),
    )
    commands = []
    for number in range(count):
        device = ("--device", f"cuda:{number % num_gpus}") if num_gpus else ()
        worker_id = worker_name(number)
        commands.append(WorkerCommand(worker_id, (*program, "--worker-id", worker_id, *device), environment, files))
    return commands


def worker_name(number: int) -> str:
    """How the workers of a server are named."""
    return f"worker-{number}"


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that CUDA would show to a worker, found without torch: those of the driver, or of CUDA_VISIBLE_DEVICES."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    present = sum(1 for name in os.listdir("/dev") if _GPU.fullmatch(name))
    if visible is None or not present:
        return present
    names = [name.strip() for name in visible.split(",")]
    # CUDA shows those before the first one that is none.
    return next((place for place, name in enumerate(names) if not name or name == "-1"), len(names))
