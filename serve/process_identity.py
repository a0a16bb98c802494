"""Whether a process that wrote something down somewhere still runs: a pid alone may be another's by now, or elsewhere."""

import os
from pathlib import Path

__all__ = ["is_running", "machine_id", "start_ticks"]


def machine_id() -> str:
    """Names this boot of this machine and its namespace of pids; pids mean the same process only where it is equal."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{os.readlink('/proc/self/ns/pid')}"


def start_ticks(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it does not run, or only as a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command's name, in parentheses, may hold anything; the fields behind it do not. See proc_pid_stat(5).
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_running(pid: int, ticks: int | None) -> bool:
    """Whether the process that had this pid and start runs on this machine; None for a start stands for none that ran."""
    return ticks is not None and start_ticks(pid) == ticks
