"""Which path each tier of a configuration really takes here, how fast it is, and what to change.

Takes the server's own cache options, and those that say which processes have tiers. Tiers are opened small, measured beside
a plain copy or the raw disk, and closed; nothing but a scratch folder inside the disk tier's directory is written, and it is
removed.
"""

import argparse
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from dynamo.kvcache.config import format_size
from dynamo.perf.disk_gds import why_no_gds
from dynamo.perf.doctor_disk import disk_tiers, examine_disk
from dynamo.perf.doctor_facts import cuda_driver, importable, lock_limit_bytes, memory_pages
from dynamo.perf.doctor_findings import Findings
from dynamo.perf.harness import BenchmarkError, median, timed
from dynamo.perf.machine import machine_record
from dynamo.perf.option_checks import checked_size
from dynamo.perf.report import Report, Result
from dynamo.serve.config import SECTIONS, CacheSettings, Config, load_config
from dynamo.serve.errors import ConfigError
from dynamo.serve.options import Option
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.errors import TierError
from dynamo.tiers.host import HostTier
from dynamo.tiers.host_budget import Holder, HostBudget
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.memory import available_memory_bytes, memory_limit_bytes
from dynamo.tiers.numa import pci_address
from dynamo.tiers.tier import Rows

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "which path each tier really takes, its GB/s beside memcpy and the raw disk, and what to change"

_LAYOUT = BlockLayout(num_layers=32, block_size=16, num_kv_heads=8, head_dim=128, itemsize=2)  # 2 MiB
_COPY_TURNS = 5
_MIN_BLOCKS = 8
_PACKAGES = ("torch", "numpy", "triton", "kvikio-cu13", "kvikio-cu12", "ucxx-cu13", "ucxx-cu12")


@dataclass(frozen=True, slots=True)
class _Seen:
    """Medians of one tier in GB/s, beside a copy of the same bytes."""

    read: float
    write: float
    ceiling: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the server's options that say where the tiers lie, and how much is measured."""
    served = parser.add_argument_group("as for python -m dynamo.serve")
    served.add_argument("--config", metavar="FILE", type=Path, help="the server's TOML file")
    for key, entry in _server_options().items():
        served.add_argument(
            str(entry.flag),
            dest=key,
            metavar=entry.metavar,
            help=entry.help.replace("%", "%%"),
            default=argparse.SUPPRESS,
        )
    workload = parser.add_argument_group("workload")
    workload.add_argument("--size", default="256MiB", help="bytes measured in each tier")


def run(options: argparse.Namespace, console: Console) -> Report:
    """Looks at everything; the report's exit status is 1 when something keeps the configuration from working as it says.

    Raises:
        BenchmarkError: the configuration is not accepted, or --size is too little.
    """
    num_blocks = checked_size("--size", options.size) // _LAYOUT.slot_bytes
    if num_blocks < _MIN_BLOCKS:
        raise BenchmarkError(
            f"--size {options.size} is too little; give {format_size(_MIN_BLOCKS * _LAYOUT.slot_bytes)}"
        )
    try:
        loaded = load_config(options.config, {k: v for k, v in vars(options).items() if k in _server_options()})
    except ConfigError as error:
        raise BenchmarkError(str(error)) from error
    config = loaded.config
    machine = machine_record()
    findings = Findings()
    results: list[Result] = []
    console.print("system ...", style="dim")
    _examine_system(findings)
    console.print("host and device ...", style="dim")
    results += _examine_memory(config, num_blocks, findings)
    if config.cache.disk_cache is None:
        findings.say("disk tier", "off")
    else:
        console.print("disk ...", style="dim")
        place = config.cache.disk_cache
        size = num_blocks * _LAYOUT.slot_bytes
        results += examine_disk(
            place,
            disk_tiers(loaded),
            config.cache.io_threads,
            size,
            _device(config),
            findings,
            keeps_in_host=bool(config.cache.host_cache),
        )
        findings.say(
            "GPUDirect Storage",
            "there; `perf disk` measures it" if (refusal := why_no_gds()) is None else f"not there: {refusal}",
        )
        if config.cache.host_cache > place.capacity_bytes:
            findings.advise("the disk tier is smaller than the host tier, so it adds little; give --disk-cache more")
    return Report(
        benchmark="doctor",
        title="Tiers as they are here: GB/s, and share of a plain copy or of the raw disk at the same depth",
        machine=machine,
        parameters={"size": num_blocks * _LAYOUT.slot_bytes},
        results=results,
        epilogue=findings.lines(),
        exit_status=1 if findings.has_problems else 0,
    )


def _server_options() -> dict[str, Option]:
    """Of the server's options, those that this command looks at, by "section.key"."""
    found = {f"cache.{entry.name}": entry for entry in SECTIONS["cache"]}
    for section, name in (("model", "device"), ("engine", "engine"), ("fleet", "workers")):
        found[f"{section}.{name}"] = next(entry for entry in SECTIONS[section] if entry.name == name)
    return found


def _examine_system(findings: Findings) -> None:
    available, limit, locked = available_memory_bytes(), memory_limit_bytes(), lock_limit_bytes()
    findings.say(
        "memory",
        f"{_size(available)} available of {_size(limit)} (machine or cgroup), "
        f"ulimit -l {'unlimited' if locked is None else format_size(locked)}",
    )
    budget = HostBudget()
    held: Sequence[Holder] = ()
    try:
        held = budget.holders()
    except OSError as error:
        findings.problem(f"what KV caches hold of their budget cannot be counted: {error}")
    findings.say(
        "budget of KV caches",
        f"{_size(budget.limit_bytes)}; "
        + (
            "; ".join(f"process {h.pid} holds {format_size(h.num_bytes)} for {h.purpose}" for h in held)
            or "nothing held"
        ),
    )
    pages = memory_pages()
    findings.say(
        "huge pages",
        f"transparent: {pages.transparent or 'none'}; set aside: {pages.num_total}, free: {pages.num_free}",
    )
    if pages.transparent == "never":
        findings.advise(
            "transparent huge pages are off: `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled` as root lets the "
            "tiers have them, for faster pinning and larger disk requests"
        )
    if pages.num_free:
        findings.advise(
            f"{pages.num_free} huge pages are set aside and free: the tiers use transparent ones, so these are lost to them; "
            "`sysctl vm.nr_hugepages=0` gives them back unless another program needs them"
        )
    findings.say("versions", ", ".join(f"{name} {version}" for name, version in _versions()))
    driver = cuda_driver()
    findings.say("CUDA", f"driver {driver}, torch built for CUDA {_cuda_build()}" if driver else "no NVIDIA driver")
    if driver and not torch.cuda.is_available():
        findings.problem(
            f"there is an NVIDIA driver ({driver}) but torch sees no GPU (built for CUDA {_cuda_build()}): install a torch "
            "built for this driver, and check CUDA_VISIBLE_DEVICES"
        )
    for module in ("kvikio", "ucxx"):
        refusal = importable(module)
        findings.say(module, "importable" if refusal is None else f"not importable: {refusal}")


def _examine_memory(config: Config, num_blocks: int, findings: Findings) -> Iterator[Result]:
    """The host tier beside memcpy, and copies between it and the device tier beside one large copy."""
    device = _device(config)
    if device.type == "cpu" and config.model.device not in (None, "cpu"):
        findings.problem(
            f"--device {config.model.device} was asked for, but torch sees no GPU; use cpu, or see to the driver"
        )
    _examine_sizes(config.cache, findings, is_on_cpu=device.type == "cpu")
    try:
        host = HostTier(_LAYOUT, num_blocks, num_staging=num_blocks, gpu=pci_address(device))
        try:
            stats = host.stats()
            pages = "pages of unknown size" if stats.page_bytes is None else f"{format_size(stats.page_bytes)} pages"
            node = "any memory node" if host.node.node is None else f"memory node {host.node.node}"
            findings.say("host tier", f"{stats.path}, {pages}, {node} ({host.node.reason})")
            if device.type == "cuda" and stats.path != "pinned":
                findings.problem("CUDA does not pin host memory: copies go at half speed; raise `ulimit -l`")
            yield from _rows("host tier", f"{stats.path}, {pages}", _measure_host(host, num_blocks))
            tier = DeviceTier(_LAYOUT, torch.float16, num_blocks, device)
            try:
                path = tier.stats().path
                findings.say("device tier", f"{device}, through {path}")
                yield from _rows("device tier", f"{device} ({path}) ↔ host", _measure_device(tier, host, num_blocks))
            finally:
                tier.close()
        finally:
            host.close()
    except TierError as error:
        findings.problem(f"memory could not be measured: {error}")


def _device(config: Config) -> torch.device:
    """Where blocks are measured: as the server chooses, but on the CPU where torch sees no GPU."""
    has_gpu = torch.cuda.is_available()
    return torch.device((config.model.device or "cuda") if has_gpu else "cpu")


def _examine_sizes(cache: CacheSettings, findings: Findings, *, is_on_cpu: bool) -> None:
    available, budget = available_memory_bytes(), HostBudget()
    if available is not None and cache.host_cache > available:
        findings.problem(
            f"--host-cache {format_size(cache.host_cache)} is more than the {format_size(available)} that are available; "
            "make it smaller, free memory, or raise the cgroup's limit"
        )
    held = 0
    with suppress(OSError):  # told already
        held = sum(holder.num_bytes for holder in budget.holders())
    if budget.limit_bytes is not None and cache.host_cache > budget.limit_bytes - held:
        findings.problem(
            f"--host-cache {format_size(cache.host_cache)} does not fit into the budget of KV caches: "
            f"{format_size(max(0, budget.limit_bytes - held))} of {format_size(budget.limit_bytes)} are left; "
            "make it smaller, or end another process"
        )
    device_bytes = cache.device_cache or 0
    if available is not None and is_on_cpu and device_bytes > available:
        findings.problem(
            f"--device-cache {format_size(device_bytes)} is more than the {format_size(available)} of memory that are "
            "available; make it smaller, free memory, or raise the cgroup's limit"
        )
    if not cache.host_cache:
        findings.say("host tier", "off; staging memory only")
    elif cache.device_cache is not None and cache.host_cache < cache.device_cache:
        findings.advise(
            "the host tier is smaller than the device tier, so it mostly repeats it; give --host-cache more"
        )


def _measure_host(host: HostTier, num_blocks: int) -> _Seen:
    rows = host.rows
    slots = np.arange(num_blocks)
    rows[:] = 1
    staging = slots + num_blocks
    return _seen(
        num_blocks * _LAYOUT.slot_bytes,
        read=lambda: host.read(slots, rows, staging),
        write=lambda: host.write(slots, rows, staging),
        **_copies(rows[num_blocks:], rows[:num_blocks]),
    )


def _measure_device(tier: DeviceTier, host: HostTier, num_blocks: int) -> _Seen:
    slots, rows = np.arange(num_blocks), host.rows
    if tier.device.type == "cuda":
        source = torch.from_numpy(rows[:num_blocks])
        target = torch.zeros_like(source, device=tier.device)

        def copy() -> None:
            target.copy_(source)
            torch.cuda.synchronize(tier.device)

        copies: dict[str, Callable[[], object]] = {"copy": copy}
    else:
        copies = _copies(rows[num_blocks:], rows[:num_blocks])
    return _seen(
        num_blocks * _LAYOUT.slot_bytes,
        read=lambda: tier.read(slots, rows, slots),
        write=lambda: tier.write(slots, rows, slots),
        **copies,
    )


def _copies(target: Rows, source: Rows) -> dict[str, Callable[[], object]]:
    """One large copy in one thread and in two: which is faster depends on the machine."""
    halves = [np.array_split(rows.reshape(-1), 2) for rows in (target, source)]

    def in_two_threads() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(np.copyto, *halves))

    return {"copy": lambda: np.copyto(target, source), "copy in two threads": in_two_threads}


def _seen(num_bytes: int, **actions: Callable[[], object]) -> _Seen:
    """Runs read, write and the copies in turn, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(_COPY_TURNS + 1):
        for name, action in actions.items():
            taken = timed(action).wall_s
            if turn:
                seconds[name].append(taken)
    rates = {name: num_bytes / median(values) / 1e9 for name, values in seconds.items()}
    ceiling = max(rate for name, rate in rates.items() if name.startswith("copy"))
    return _Seen(rates["read"], rates["write"], ceiling)


def _rows(case: str, subject: str, seen: _Seen) -> Iterator[Result]:
    for metric, value in (("read", seen.read), ("write", seen.write)):
        yield Result(case=case, subject=subject, metric=metric, value=value, unit="GB/s", samples=_COPY_TURNS)
        yield Result(case=case, subject=subject, metric=f"{metric} share", value=100 * value / seen.ceiling, unit="%")
    for metric in ("read", "write"):
        yield Result(
            case=case, subject="one copy of all", metric=metric, value=seen.ceiling, unit="GB/s", samples=_COPY_TURNS
        )


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def _cuda_build() -> str:
    return torch.version.cuda or "none"


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else format_size(num_bytes)
