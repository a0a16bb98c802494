"""What the system says of its memory, its disks and the libraries it has. Reads only; every root can be another folder."""

import contextlib
import importlib.util
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Mount",
    "Pages",
    "cuda_driver",
    "importable",
    "lock_holder",
    "lock_limit_bytes",
    "memory_pages",
    "mount_of",
    "nearest_folder",
]

_PROC, _SYS = Path("/proc"), Path("/sys")
_IMPORT_TIMEOUT_S = 60.0
_VIRTUAL = ("vd", "xvd", "loop", "zram", "nbd", "rbd", "dm-", "md")  # these call themselves rotating, or not, at random
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Pages:
    """How the system gives out huge pages.

    Attributes:
        transparent: "always", "madvise" or "never"; None where the kernel has none.
        num_free, num_total: of the pool set aside for explicit use.
    """

    transparent: str | None
    num_free: int
    num_total: int


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a folder lies.

    Attributes:
        file_system: such as "ext4".
        device: name below /sys/block, such as "nvme0n1"; what was mounted where that is no block device.
        options: of the mount and of the file system.
        kind: "NVMe", "solid state", "rotating", "virtual" (which says nothing of the disk behind it), "no block device".
    """

    folder: Path
    file_system: str
    device: str
    options: str
    kind: str


def memory_pages(proc: Path = _PROC, sys: Path = _SYS) -> Pages:
    """State of transparent and explicit huge pages."""
    transparent = None
    with contextlib.suppress(OSError):
        text = (sys / "kernel/mm/transparent_hugepage/enabled").read_text()
        transparent = next((word.strip("[]") for word in text.split() if word.startswith("[")), None)
    counts = {"HugePages_Free": 0, "HugePages_Total": 0}
    with contextlib.suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in counts:
                counts[name] = int(value)
    return Pages(transparent, counts["HugePages_Free"], counts["HugePages_Total"])


def mount_of(folder: Path, proc: Path = _PROC, sys: Path = _SYS) -> Mount | None:
    """The mount that an existing folder lies on; None where procfs does not say."""
    target = folder.resolve()
    found = None
    try:
        lines = (proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:  # id parent major:minor root mount-point options [fields…] - type source super-options
        left, _, right = line.partition(" - ")
        _, _, number, _, point, options, *_ = left.split()
        file_system, source, super_options = (*right.split(), "", "")[:3]
        place = Path(_ESCAPE.sub(lambda match: chr(int(match[1], 8)), point))
        if (target == place or place in target.parents) and (
            found is None or len(place.parts) >= len(found.folder.parts)  # a later mount hides an earlier one
        ):
            device, kind = _device(sys, number, source)
            found = Mount(place, file_system, device, f"{options},{super_options}".strip(","), kind)
    return found


def lock_holder(file: Path, proc: Path = _PROC) -> int | None:
    """The process that holds a lock on `file`, without asking for the lock; None for nobody (or a hidden process)."""
    try:
        status = file.stat()
        lines = (proc / "locks").read_text().splitlines()
    except OSError:
        return None
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        fields = line.split()
        if name in fields and "->" not in fields:
            return int(fields[fields.index(name) - 1])
    return None


def nearest_folder(path: Path) -> Path:
    """`path`, or the lowest folder above it that exists, as far as this user can see."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if os.path.isdir(folder))


def lock_limit_bytes() -> int | None:
    """`ulimit -l`: memory that this process may lock; None for no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def cuda_driver(proc: Path = _PROC) -> str | None:
    """Version of the NVIDIA driver; None without one."""
    with contextlib.suppress(OSError):
        match = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", (proc / "driver/nvidia/version").read_text())
        return match[1] if match else "unknown version"
    return None


def importable(module: str) -> str | None:
    """Why `module` cannot be imported, tried in another process since a broken library may end it; None if it can."""
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"its import takes longer than {_IMPORT_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"its import ends with status {done.returncode}"])[-1]


def _device(sys: Path, number: str, source: str) -> tuple[str, str]:
    """(name, kind) of the block device with "major:minor"."""
    block = sys / "dev/block" / number
    if not block.exists():
        return source, "no block device"
    folder = block.resolve()
    disk = folder.parent if (folder / "partition").exists() else folder
    if disk.name.startswith("nvme"):
        return folder.name, "NVMe"
    if disk.name.startswith(_VIRTUAL):
        return folder.name, "virtual"
    with contextlib.suppress(OSError):
        return folder.name, "rotating" if (disk / "queue/rotational").read_text().strip() == "1" else "solid state"
    return folder.name, "unknown"
