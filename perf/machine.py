"""What a measurement was made on: a number without its machine, versions and commit says nothing."""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["MachineRecord", "git_commit", "machine_record"]

_PACKAGES = ("dynamo-kv", "torch", "numpy", "xxhash", "starlette", "uvicorn", "uvloop", "msgspec")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRecord:
    """The machine and software of one run. Names no host, user or path, so that results can be published.

    Attributes:
        cpus: processors this process may use, which a container or `taskset` makes fewer than the machine has.
        load: runnable processes of the last minute when the run began: much above 0 means a busy machine.
        commit: of the source tree, with "+changes" where it differs from it; None outside a checkout.
        started: UTC, ISO 8601, whole seconds.
    """

    cpu: str
    cpus: int
    memory_bytes: int
    kernel: str
    python: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    load: float
    commit: str | None
    started: str


def machine_record() -> MachineRecord:
    """Describes this machine now. Runs git; imports no torch, which would pay for more than a name."""
    return MachineRecord(
        cpu=_cpu_model(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        python=platform.python_version(),
        versions=_versions(),
        gpus=_gpus(),
        load=round(os.getloadavg()[0], 2),
        commit=git_commit(Path(__file__).resolve().parent),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def git_commit(folder: Path) -> str | None:
    """Short commit of the checkout `folder` lies in, or None when it lies in none, git is missing, or there is no commit."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changes else commit


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _gpus() -> tuple[str, ...]:
    folders = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = (line for path in folders for line in path.read_text().splitlines() if line.startswith("Model:"))
    return tuple(line.partition(":")[2].strip() for line in lines)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
