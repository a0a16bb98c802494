"""The disk tier's place: file system, device, lock, space, and the tier beside the raw disk in a scratch folder there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from dynamo.kvcache.config import DiskPlace, format_size
from dynamo.perf.disk_tier import Comparison, TierSide, Windows, compare
from dynamo.perf.doctor_facts import lock_holder, mount_of, nearest_folder
from dynamo.perf.doctor_findings import Findings
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.report import Result
from dynamo.tiers.errors import TierError

__all__ = ["examine_disk"]

_BLOCK_BYTES = 2 << 20
_TURNS = 5
_DEPTHS = (4, 16)  # of the raw disk; `perf disk` looks closer
_SLOW_SHARE = 60.0
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse", "ceph", "lustre", "overlay"})


def examine_disk(
    place: DiskPlace,
    io_threads: int,
    size: int,
    device: torch.device,
    findings: Findings,
    *,
    keeps_in_host: bool,
) -> Iterator[Result]:
    """Facts, advice, problems and rates of a disk tier at `place`. Nothing there is changed.

    Args:
        size: bytes to measure with; written for a while.
        device: where the blocks are wanted.
        keeps_in_host: there is a host tier.
    """
    folder = nearest_folder(place.directory)
    findings.say("disk tier", f"{place.directory}, {format_size(place.capacity_bytes)}")
    if folder != place.directory.absolute():
        findings.say("", f"does not exist yet; measured in {folder}")
    _examine_mount(folder, findings)
    _examine_space(place, folder, findings)
    holders = {lock.parent: lock_holder(lock) for lock in sorted(place.directory.glob("*/LOCK"))}
    for owned, pid in holders.items():
        if pid is not None:
            findings.advise(
                f"process {pid} uses {owned}: its load is part of what was measured, and no other process can use "
                "the same model's blocks there"
            )
    findings.say(
        "", f"models with blocks here: {len(holders)}, in use now: {sum(p is not None for p in holders.values())}"
    )
    if not os.access(folder, os.W_OK | os.X_OK):
        findings.problem(f"this user may not write to {folder}: give it the permission, or --disk-cache another folder")
        return
    if shutil.disk_usage(folder).free < 2 * size:
        findings.advise(f"too little space is free in {folder} to measure; give less --size")
        return
    try:
        with tempfile.TemporaryDirectory(prefix="dynamo-perf-doctor-", dir=folder) as scratch:
            yield from _measure(Path(scratch), io_threads, size, device, findings, keeps_in_host=keeps_in_host)
    except (OSError, TierError, BenchmarkError) as error:
        findings.problem(f"the disk tier could not be measured in {folder}: {error}")


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


def _examine_space(place: DiskPlace, folder: Path, findings: Findings) -> None:
    used = sum(file.stat().st_blocks * 512 for file in place.directory.glob("*/*") if file.is_file())
    free = shutil.disk_usage(folder).free
    findings.say("", f"{format_size(free)} free, {format_size(used)} taken by KV blocks already")
    if place.capacity_bytes > free + used:
        findings.problem(
            f"--disk-cache asks for {format_size(place.capacity_bytes)}, but only {format_size(free + used)} can be had in "
            f"{folder}: blocks are dropped when the disk is full; ask for less or free space"
        )


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
