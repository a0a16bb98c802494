"""The disk tier's place: file system, device, lock, space, and the tier beside the raw disk in a scratch folder there."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dynamo.kvcache.config import DiskPlace, format_size
from dynamo.perf.disk_tier import Comparison, TierSide, Windows, compare
from dynamo.perf.doctor_facts import lock_holder, mount_of, nearest_folder
from dynamo.perf.doctor_findings import Findings
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.report import Result
from dynamo.serve.assembly import mocker_place
from dynamo.serve.config import LoadedConfig
from dynamo.serve.worker_commands import disk_share, worker_name
from dynamo.tiers.disk_space import disk_space, find_obstacle
from dynamo.tiers.errors import TierError
from dynamo.tiers.namespace import held_bytes, is_namespace_name

__all__ = ["disk_tiers", "examine_disk"]

_BLOCK_BYTES = 2 << 20
_TURNS = 5
_DEPTHS = (4, 16)  # of the raw disk; `perf disk` looks closer
_SLOW_SHARE = 60.0
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse", "ceph", "lustre", "overlay"})


def disk_tiers(loaded: LoadedConfig) -> list[DiskPlace]:
    """Where each process of a configuration that computes has its disk tier, and how large it may be; none when it is off."""
    place, workers = disk_share(loaded), loaded.config.fleet.workers
    if place is None:
        return []
    places = [place] if workers is None else [place.below(worker_name(number)) for number in range(workers)]
    return [mocker_place(each) for each in places] if loaded.config.engine.engine == "mocker" else places


def examine_disk(
    place: DiskPlace,
    tiers: Sequence[DiskPlace],
    io_threads: int,
    size: int,
    device: torch.device,
    findings: Findings,
    *,
    keeps_in_host: bool,
) -> Iterator[Result]:
    """Facts, advice, problems and rates of disk tiers at `place`. Nothing there is changed.

    Args:
        tiers: at least one, of one size, in it or below; see `disk_tiers`.
        size: bytes to measure with; written for a while, in the first directory.
        device: where the blocks are wanted.
        keeps_in_host: there is a host tier.
    """
    times = f"{len(tiers)} times " if len(tiers) > 1 else ""
    findings.say("disk tier", f"{place}, {times}{format_size(tiers[0].capacity_bytes)}")
    obstacles = [obstacle for directory in place.directories if (obstacle := find_obstacle(directory)) is not None]
    for obstacle in obstacles:
        findings.problem(f"{obstacle} is no folder, so no disk tier can be there: give --disk-cache another path")
    if obstacles:
        return
    own = [directory for tier in tiers for directory in tier.directories]
    folders = [nearest_folder(directory) for directory in place.directories]
    folder = folders[0]
    if folder != place.directories[0].absolute():
        findings.say("", f"does not exist yet; measured in {folder}")
    for mounted in dict.fromkeys(folders):
        _examine_mount(mounted, findings)
    used = dict.fromkeys([*folders, *(nearest_folder(directory) for directory in own)])
    closed = [where for where in used if not os.access(where, os.W_OK | os.X_OK)]
    for where in closed:
        findings.problem(f"this user may not write to {where}: give it the permission, or --disk-cache another folder")
    if closed:
        return
    locks = [lock for directory in _tier_folders(place) for lock in sorted(directory.glob("*/LOCK"))]
    holders = {lock.parent: lock_holder(lock) for lock in locks}
    _examine_space(place, tiers, {owned.parent: pid for owned, pid in holders.items() if pid is not None}, findings)
    for owned, pid in holders.items():
        if pid is not None:
            findings.advise(
                f"process {pid} uses {owned}: its load is part of what was measured, and no other process can use "
                "the same model's blocks there"
            )
    findings.say(
        "", f"models with blocks here: {len(holders)}, in use now: {sum(p is not None for p in holders.values())}"
    )
    if shutil.disk_usage(folder).free < 2 * size:
        findings.advise(f"too little space is free in {folder} to measure; give less --size")
        return
    try:
        with tempfile.TemporaryDirectory(prefix="dynamo-perf-doctor-", dir=folder) as scratch:
            yield from _measure(Path(scratch), io_threads, size, device, findings, keeps_in_host=keeps_in_host)
    except (OSError, TierError, BenchmarkError) as error:
        findings.problem(f"the disk tier could not be measured in {folder}: {error}")


def _tier_folders(place: DiskPlace) -> list[Path]:
    """The place's own folders, and those in them that have blocks: of workers, and of the mocker in either."""
    found = list(place.directories)
    mocked = mocker_place(place).directories[0].name
    for directory in place.directories:
        with contextlib.suppress(OSError):  # of folders in it that have nothing to do with it
            locks = [*directory.glob("*/*/LOCK"), *directory.glob(f"*/{mocked}/*/LOCK")]
            found += sorted({lock.parent.parent for lock in locks if is_namespace_name(lock.parent.name)})
    return found


def _examine_mount(folder: Path, findings: Findings) -> None:
    mount = mount_of(folder)
    if mount is None:
        return
    findings.say("", f"{mount.file_system} on {mount.device} ({mount.kind}), mounted with {mount.options}")
    if mount.file_system in ("tmpfs", "ramfs"):
        findings.advise(
            f"{folder} is memory ({mount.file_system}), not a disk: a larger --host-cache is faster and simpler"
        )
    elif mount.file_system.partition(".")[0] in _NETWORK:
        findings.advise(
            f"{mount.file_system} goes through other software to a disk: give --disk-cache a local file system"
        )
    if mount.kind == "rotating":
        findings.advise(f"{mount.device} rotates: computing is often faster than reading from it; use an SSD")
    if "sync" in mount.options.split(",") or "dirsync" in mount.options.split(","):
        findings.advise(f"{mount.folder} is mounted with sync, which slows writing down; the tier does not need it")


def _examine_space(
    place: DiskPlace, tiers: Sequence[DiskPlace], holders: Mapping[Path, int], findings: Findings
) -> None:
    """`holders`: processes that use a folder with blocks now."""
    own = [directory for tier in tiers for directory in tier.directories]
    try:
        spaces = disk_space(own, sum(tier.capacity_bytes for tier in tiers))
        others = {
            folder: held_bytes(folder) for folder in _tier_folders(place) if folder not in own and folder.is_dir()
        }
    except OSError as error:
        findings.problem(
            f"what is free in {place} and taken by KV blocks cannot be told: {error}; give this user the permission, or "
            "--disk-cache another folder"
        )
        return
    for space in spaces:
        free, held = space.free_bytes, space.held_bytes
        # Tiers below a directory are named by it, as there may be many.
        named = [d for d in place.directories if any(d in (one, *one.parents) for one in space.directories)]
        where = ", ".join(map(str, named))
        findings.say("", f"{where}: {format_size(free)} free, {format_size(held)} taken by KV blocks already")
        if space.missing_bytes:
            findings.problem(
                f"--disk-cache asks for {format_size(space.wanted_bytes)}, but only {format_size(free + held)} can be had in "
                f"{where}: blocks are dropped when the disk is full; ask for less or free space"
            )
    for folder, held in others.items():
        if held:
            findings.say("", f"{folder}: {format_size(held)} taken by KV blocks, {_whose(folder, place, holders)}")


def _whose(folder: Path, place: DiskPlace, holders: Mapping[Path, int]) -> str:
    """Who might give up the blocks of a folder that is none of this configuration."""
    if folder in holders:
        return f"of process {holders[folder]}, which has its disk tier there"
    above = next(directory for directory in place.directories if directory in (folder, *folder.parents))
    # Below a directory, workers have folders of their names, which are not all numbered.
    name = next(iter(folder.relative_to(above).parts), "")
    worker = (
        f"; a worker would that is started with --worker-id {name}"
        if name != mocker_place(place).directories[0].name
        else ""
    )
    return f"which no tier of this configuration gives up{worker if name else ''}"


def _measure(
    scratch: Path, io_threads: int, size: int, device: torch.device, findings: Findings, *, keeps_in_host: bool
) -> Iterator[Result]:
    num_blocks = max(2, size // _BLOCK_BYTES // 2)
    windows = Windows(block_bytes=_BLOCK_BYTES, num_blocks=num_blocks, num_windows=2)
    with TierSide([scratch / "tier"], windows, io_threads) as ours:
        findings.say("", f"path: {ours.name}")
        findings.say("", f"to {device}: {ours.find_device_path(device, keeps_in_host=keeps_in_host)}")
        if "buffered" in ours.name:
            findings.problem(
                f"O_DIRECT does not work in {scratch.parent}: blocks go through the page cache, which costs memory and "
                "speed; use ext4 or XFS"
            )
        plan = Comparison(windows=windows, depths={True: list(_DEPTHS), False: list(_DEPTHS)}, repeats=_TURNS)
        results = compare(ours, [], plan, lambda _: None)
    for result in results:
        if result.subject == ours.name and result.unit == "%" and result.value < _SLOW_SHARE:
            findings.advise(
                f"the disk tier's {result.metric} is {result.value:.0f} % of the raw disk: run `python -m dynamo.perf disk "
                f"--path {scratch.parent}` for the settings that serve best here"
            )
        yield result
