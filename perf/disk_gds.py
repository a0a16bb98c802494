"""Reading and writing GPU memory: straight to the disk with GPUDirect Storage, and through pinned memory beside it."""

import importlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dynamo.kvcache.config import format_size
from dynamo.perf.disk_raw import aligned_memory
from dynamo.perf.report import Result
from dynamo.tiers.kvikio_io import find_kvikio

__all__ = ["gds_results", "why_no_gds"]

_CASE = "GPU memory"


def why_no_gds() -> str | None:
    """Why GPUDirect Storage cannot be measured here; None where it can."""
    found = find_kvikio()
    if isinstance(found, str):
        return found
    if found.is_compat_mode():
        return "kvikio goes through host memory: it finds no nvidia-fs driver, or was told so; see `gdscheck -p`"
    return None


def gds_results(folder: Path, size: int, call_bytes: int, depth: int) -> Iterator[Result]:
    """Writes and reads `size` bytes of GPU memory each way; call only where `why_no_gds` says None.

    The bytes read back are compared with those written.

    Raises:
        RuntimeError: they differ, or kvikio refuses.
    """
    kvikio: Any = importlib.import_module("kvikio")
    kvikio.defaults.set({"num_threads": depth, "task_size": call_bytes})
    path = folder / "gds.dat"
    buffer = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    expected = buffer.clone()
    try:
        with kvikio.CuFile(str(path), "w+") as file:
            ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
                f"GDS, {format_size(call_bytes)} tasks, {depth} threads": (
                    lambda: _whole(file.pwrite(buffer).get(), size),
                    lambda: _whole(file.pread(buffer).get(), size),
                ),
                f"bounce, {format_size(call_bytes)} pinned": _bounce(path, buffer, call_bytes),
            }
            for name, (write, read) in ways.items():
                rates = {"write": _rate(write, size)}
                buffer.zero_()
                rates["read"] = _rate(read, size)
                if not torch.equal(buffer, expected):
                    raise RuntimeError(f"{name} read back other bytes than it wrote")
                for metric, rate in rates.items():
                    yield Result(case=_CASE, subject=name, metric=metric, value=rate, unit="GB/s", samples=1)
    finally:
        path.unlink(missing_ok=True)


def _bounce(path: Path, buffer: torch.Tensor, call_bytes: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """One call after the other through one pinned buffer: what a tier's two hops overlap, this does not."""
    memory = aligned_memory(call_bytes)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostRegister(host.data_ptr(), call_bytes, 0)

    def move(*, writes: bool) -> None:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            for start in range(0, buffer.numel() - call_bytes + 1, call_bytes):
                part = buffer[start : start + call_bytes]
                if writes:
                    host.copy_(part)
                    _whole(os.pwritev(fd, [memory], start), call_bytes)
                else:
                    _whole(os.preadv(fd, [memory], start), call_bytes)
                    part.copy_(host)
        finally:
            os.close(fd)

    return lambda: move(writes=True), lambda: move(writes=False)


def _rate(move: Callable[[], None], size: int) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    move()
    torch.cuda.synchronize()
    return size / (time.perf_counter() - began) / 1e9


def _whole(moved: int, wanted: int) -> None:
    if moved != wanted:
        raise RuntimeError(f"the disk moved {moved} bytes of {wanted}")
