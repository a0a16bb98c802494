"""Which memory node an arena should lie on, and asking the kernel for it.

A node is preferred, never forced: where it is full, memory comes from another one, slower but there. On a machine of one
node nothing is asked for.
"""

import ctypes
import os
import platform
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynamo.kernels.checks import Rows

__all__ = ["MemoryNode", "choose_node", "pci_address", "prefer_node"]

_SYS = Path("/sys")
_MPOL_PREFERRED = 1
_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers: libc itself has no mbind, and libnuma is rarely there


@dataclass(frozen=True, slots=True)
class MemoryNode:
    """The node that memory should come from.

    Attributes:
        node: its number; None where any is as good, or nothing is known.
        reason: why, as part of a sentence.
    """

    node: int | None
    reason: str


def choose_node(gpu: str | None, cpus: Set[int] | None = None, sys: Path = _SYS) -> MemoryNode:
    """The GPU's node, or else the one that all CPUs of this process belong to.

    Args:
        gpu: PCI address such as "0000:17:00.0" of the GPU that the memory is for; None for none.
        cpus: those that the memory's users run on; by default those that this process may use.
        sys: where sysfs is mounted.
    """
    nodes = _listed(sys / "devices/system/node/has_memory") or _listed(sys / "devices/system/node/online")
    if len(nodes) < 2:
        return MemoryNode(None, "the machine has one memory node")
    if gpu is not None:
        node = _gpu_node(sys, gpu)
        if node in nodes:
            return MemoryNode(node, f"GPU {gpu} is attached to node {node}")
    own = os.sched_getaffinity(0) if cpus is None else cpus
    homes = [node for node in sorted(nodes) if own & _listed(sys / f"devices/system/node/node{node}/cpulist")]
    if len(homes) == 1:
        return MemoryNode(homes[0], f"this process runs on CPUs of node {homes[0]} only")
    return MemoryNode(None, f"this process may run on CPUs of {len(homes)} nodes; `numactl --cpunodebind` narrows that")


def pci_address(device: torch.device) -> str | None:
    """Where a CUDA device sits, such as "0000:17:00.0"; None for other devices and where torch does not say."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks these three
    try:
        return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except AttributeError:  # a torch from before it told
        return None


def prefer_node(rows: Rows, node: int) -> str | None:
    """Asks that pages of `rows` that are not resident yet come from `node`.

    Returns:
        None, or why the kernel does not.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"no mbind known for {platform.machine()}"
    words = [0] * (node // 64 + 1)
    words[node // 64] = 1 << node % 64
    mask = (ctypes.c_uint64 * len(words))(*words)
    libc = ctypes.CDLL(None, use_errno=True)
    code = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_size_t(rows.nbytes),
        ctypes.c_int(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(64 * len(words) + 1),  # the kernel takes one bit less than it is told
        ctypes.c_uint(0),
    )
    return None if code == 0 else os.strerror(ctypes.get_errno())


def _gpu_node(sys: Path, gpu: str) -> int | None:
    try:
        return int((sys / "bus/pci/devices" / gpu.lower() / "numa_node").read_text())  # -1: the firmware does not say
    except (OSError, ValueError):
        return None


def _listed(file: Path) -> frozenset[int]:
    """Numbers of a kernel list such as "0-3,8"; none where the file is missing."""
    try:
        parts = [part.partition("-") for part in file.read_text().strip().split(",") if part]
        return frozenset(n for first, _, last in parts for n in range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return frozenset()
