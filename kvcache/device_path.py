"""How blocks get between the disk tier and device memory: by one hop, or by two through host memory.

    two hops   disk ──► rows of the host arena ──► device      digests of kind XXH3, or LINES, compared by the CPU
    one hop    disk ──► rows of device memory ──► device       digests of kind LINES, compared by the GPU

One hop is GPUDirect Storage. It does not read into the slots that a sequence waits for, but into rows beside them, from which
a block is copied within the device when its digest was compared: a read that hangs then holds up nobody who has given up
waiting, no sequence ever sees a byte that was not checked, and loads by either way end, expire and fail alike.

Where there is a host tier, bytes take two hops although one would do, since what comes from disk is kept in that tier, and
what goes to disk lies there already. So do blocks of kind XXH3, which a cache without GPUDirect Storage has written.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dynamo.kernels.digest import digest_rows
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.pool import BlockPool
from dynamo.kvcache.shelf import Shelf, digest_seeds
from dynamo.tiers.device import DeviceTier, Fence
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierMemoryError
from dynamo.tiers.slot_digests import DigestKind, DigestKinds, Digests, digest_slots, match_digests
from dynamo.tiers.tier import Outcomes, SlotIds
from dynamo.tiers.transfer import Capabilities, Direct, Medium, route

__all__ = ["DevicePaths", "DirectPath", "HostPath", "PathChoice", "find_device_path"]

logger = logging.getLogger(__name__)

_KEEPS_IN_HOST = "GPUDirect Storage works here, but blocks are kept in the host tier on their way"


@dataclass(frozen=True, slots=True)
class PathChoice:
    """What was found.

    Attributes:
        staging: device memory for one hop, which the caller owns; None for two hops.
        description: the path and why it is that one, as a sentence.
    """

    staging: DeviceTier | None
    description: str


def find_device_path(disk: DiskTier, device: DeviceTier, *, keeps_in_host: bool, num_rows: int) -> PathChoice:
    """Finds out which path blocks of `disk` are to take to and from `device`, and says it and the reason in the log.

    With a GPU this writes and reads a file of a mebibyte in each of the tier's directories, unless that was done before.

    Args:
        keeps_in_host: there is a host tier.
        num_rows: blocks of device memory to take for one hop.
    """
    staging, reason = None, _prove(disk, device.device)
    if reason is None and keeps_in_host:
        reason = _KEEPS_IN_HOST
    elif reason is None:
        staging, reason = _stage(device, num_rows)
    if reason is None:
        description = "one hop: GPUDirect Storage and digests made on the device are proven"
    else:
        description = f"two hops through host memory: {reason}"
    logger.info("disk tier %s to %s: %s", disk.folder, device.device, description)
    return PathChoice(staging, description)


class HostPath:
    """Rows of the host arena, host slots or staging rows, and how bytes get in and out of them. Thread-safe."""

    digest_kind = DigestKind.XXH3

    def __init__(self, shelf: Shelf, device: DeviceTier) -> None:
        """Owns neither."""
        self._shelf = shelf
        self._device = device
        self.load_pools: tuple[BlockPool, ...] = (shelf.host, shelf.staging)
        self.save_pools: tuple[BlockPool, ...] = (shelf.staging,)

    def read(self, disk: DiskTier, slots: SlotIds, rows: SlotIds) -> Outcomes:
        """`disk.read` into rows."""
        return disk.read(slots, self._shelf.rows, rows)

    def write(self, disk: DiskTier, slots: SlotIds, rows: SlotIds) -> Outcomes:
        """`disk.write` from rows."""
        return disk.write(slots, self._shelf.rows, rows)

    def fetch(self, device_slots: SlotIds, rows: SlotIds, after: Sequence[Fence]) -> Outcomes:
        """Copies device slots to rows; see `DeviceTier.read`."""
        return self._device.read(device_slots, self._shelf.rows, rows, after=after)

    def deliver(self, device_slots: SlotIds, rows: SlotIds, after: Sequence[Fence]) -> Outcomes:
        """Copies rows to device slots; see `DeviceTier.write`."""
        return self._device.write(device_slots, self._shelf.rows, rows, after=after)

    def digest(self, rows: SlotIds, keys: Sequence[BlockKey]) -> Digests:
        """Digests of `digest_kind` of the blocks in rows."""
        return digest_rows(self._shelf.rows, rows, digest_seeds(keys), self._device.layout.block_bytes)

    def match(self, rows: SlotIds, keys: Sequence[BlockKey], digests: Digests, kinds: DigestKinds) -> Outcomes:
        """bool [n]: whether the blocks in rows have these digests."""
        return match_digests(
            self._shelf.rows, rows, digest_seeds(keys), self._device.layout.block_bytes, digests, kinds
        )


class DirectPath:
    """Rows of device memory, and how bytes get in and out of them without the host; else as `HostPath`."""

    digest_kind = DigestKind.LINES

    def __init__(self, shelf: Shelf, device: DeviceTier, staging: DeviceTier) -> None:
        """Owns nothing. `staging` has as many slots as `shelf` has direct rows."""
        self._device = device
        self._staging = staging
        self._first_row = shelf.first_direct_row
        self.load_pools: tuple[BlockPool, ...] = (shelf.direct,)
        self.save_pools: tuple[BlockPool, ...] = (shelf.direct,)

    def read(self, disk: DiskTier, slots: SlotIds, rows: SlotIds) -> Outcomes:
        """`disk.read_device` into rows."""
        return disk.read_device(slots, self._staging.storage, rows - self._first_row)

    def write(self, disk: DiskTier, slots: SlotIds, rows: SlotIds) -> Outcomes:
        """`disk.write_device` from rows."""
        return disk.write_device(slots, self._staging.storage, rows - self._first_row)

    def fetch(self, device_slots: SlotIds, rows: SlotIds, after: Sequence[Fence]) -> Outcomes:
        """Copies device slots to rows."""
        return self._staging.copy_from(rows - self._first_row, self._device, device_slots, after=after)

    def deliver(self, device_slots: SlotIds, rows: SlotIds, after: Sequence[Fence]) -> Outcomes:
        """Copies rows to device slots."""
        return self._device.copy_from(device_slots, self._staging, rows - self._first_row, after=after)

    def digest(self, rows: SlotIds, keys: Sequence[BlockKey]) -> Digests:
        """Digests of `digest_kind` of the blocks in rows."""
        return self._staging.digest(rows - self._first_row, digest_seeds(keys))

    def match(self, rows: SlotIds, keys: Sequence[BlockKey], digests: Digests, kinds: DigestKinds) -> Outcomes:
        """bool [n]: whether the blocks in rows have these digests; False for digests of another kind."""
        matching: Outcomes = (self.digest(rows, keys) == digests) & (kinds == self.digest_kind)
        return matching


class DevicePaths:
    """The paths of a store, and which one is whose.

    Attributes:
        through_host: there is always this one.
        preferred: the path of what does not stay in host memory.
    """

    def __init__(self, shelf: Shelf, device: DeviceTier, staging: DeviceTier | None) -> None:
        """Owns nothing. `staging` as found by `find_device_path`."""
        self._shelf = shelf
        self.through_host = HostPath(shelf, device)
        self.preferred = DirectPath(shelf, device, staging) if staging else self.through_host

    def of_rows(self, rows: SlotIds) -> HostPath | DirectPath:
        """The path that rows, at least one, belong to."""
        return self.preferred if self._shelf.is_direct_row(rows) else self.through_host

    def of_blocks(self, disk_slots: SlotIds) -> tuple[HostPath | DirectPath, int]:
        """The path for the first of some blocks on disk, at least one, which are held; and for how many from there on."""
        if self.preferred is self.through_host:
            return self.through_host, len(disk_slots)
        is_fit = self._shelf.disk_digest_kinds[disk_slots] == self.preferred.digest_kind
        is_other = is_fit != is_fit[0]
        count = int(np.argmax(is_other)) if is_other.any() else len(disk_slots)
        return (self.preferred if is_fit[0] else self.through_host), count


def _prove(disk: DiskTier, device: torch.device) -> str | None:
    """Why disk and device do not exchange bytes directly; None if they do."""
    if not disk.has_device_io:
        if device.type != "cuda":
            return "no CUDA device"
        for proof in disk.prove_gds(device):
            if not proof.ok:
                return proof.reason
    way = route(Medium.DISK, Medium.DEVICE, Capabilities(gds=disk.has_device_io))
    return None if isinstance(way, Direct) else "GPUDirect Storage is not proven"


def _stage(device: DeviceTier, num_rows: int) -> tuple[DeviceTier | None, str | None]:
    """Device memory in which digests are right; or why there is none."""
    try:
        staging = device.new_like(num_rows)
    except TierMemoryError as error:
        return None, f"GPUDirect Storage works here, but device memory does not suffice for it: {error}"
    content = np.frombuffer(bytearray(os.urandom(device.layout.slot_bytes)), dtype=np.uint8).reshape(1, -1)
    slot, seed = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.uint64)
    try:
        staging.write(slot, content, slot)
        found = staging.digest(slot, seed)
    except _kernel_errors() as error:
        reason = f"the device makes no digests: {error}"
    else:
        if found[0] == digest_slots(torch.from_numpy(content), slot, seed, device.layout.block_bytes).numpy()[0]:
            return staging, None
        reason = "the device makes other digests than the CPU"
    staging.close()
    return None, f"GPUDirect Storage works here, but {reason}"


def _kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel that cannot be had may raise: Triton's errors have a root of their own."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ImportError, RuntimeError
    return ImportError, RuntimeError, TritonError
