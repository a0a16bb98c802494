"""Slots straight between a file and GPU memory through kvikio, where that is proven to be GPUDirect Storage.

kvikio opens no file without libcuda, so it is imported only when a CUDA driver is there. Its compatibility mode, which goes
through host memory behind the caller's back, is no gain over two hops of our own and counts as no GPUDirect Storage.
https://docs.rapids.ai/api/kvikio/stable/
"""

import contextlib
import importlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol, cast

import numpy as np
import torch

from dynamo.kernels.checks import KernelArgumentError, Rows, SlotIds
from dynamo.tiers.block_file import BlockFile, fault_kind
from dynamo.tiers.slot_io import IOResult, PendingIO

__all__ = ["GdsProof", "Kvikio", "KvikioIO", "find_kvikio", "prove_gds"]

logger = logging.getLogger(__name__)

_PROOF_BYTES = 1 << 20


class _Future(Protocol):
    def get(self) -> int: ...


class _CuFile(Protocol):
    def pread(self, buf: object, size: int | None = ..., file_offset: int = ...) -> _Future: ...

    def pwrite(self, buf: object, size: int | None = ..., file_offset: int = ...) -> _Future: ...

    def close(self) -> None: ...


class Kvikio(Protocol):
    """What is used of kvikio; a seam for tests."""

    def open(self, path: Path) -> _CuFile:
        """A handle to read and write an existing file."""

    def is_compat_mode(self) -> bool:
        """Whether kvikio or cuFile goes through host memory."""


@dataclass(frozen=True, slots=True)
class GdsProof:
    """Outcome of trying GPUDirect Storage in a folder.

    Attributes:
        ok: bytes went from GPU memory to the file and back, and were the same on the GPU and on the host.
        reason: why it counts as proven or not, for the log.
        compat_mode: kvikio works there, but through host memory.
    """

    ok: bool
    reason: str
    compat_mode: bool = False


def find_kvikio() -> Kvikio | str:
    """kvikio, or why there is none. Imports it only with a CUDA driver."""
    if not torch.cuda.is_available():
        return "there is no CUDA driver"
    try:
        module = importlib.import_module("kvikio")
        defaults = importlib.import_module("kvikio.defaults")
        driver = importlib.import_module("kvikio.cufile_driver")
    except (ImportError, OSError, RuntimeError) as error:
        return f"kvikio cannot be imported ({error}); install dynamo-kv[gds]"
    return _Installed(module, defaults, driver)


def prove_gds(folder: Path, device: torch.device, kvikio: Kvikio) -> GdsProof:
    """Writes from the GPU into a file of `folder`, and reads it back to the GPU and, not through kvikio, to the host.

    Leaves no file behind and never raises for what does not work.
    """
    try:
        if kvikio.is_compat_mode():
            return GdsProof(False, "kvikio is in compatibility mode, through host memory", compat_mode=True)
        with _proof_file(folder) as path:
            return _round_trip(path, device, kvikio)
    except (OSError, RuntimeError) as error:  # torch's and kvikio's C++ errors arrive as RuntimeError
        return GdsProof(False, f"it failed: {error}")


class KvikioIO:
    """A `SlotIO` whose rows are GPU memory: uint8 tensors [num_rows, slot_bytes], contiguous. Owns its file handles.

    Work on the rows that is queued on a stream must be done before a write starts; a read is complete when its result is.
    """

    def __init__(self, kvikio: Kvikio) -> None:
        """Use it only in folders where `prove_gds` said so."""
        self._kvikio = kvikio
        self._lock = Lock()
        self._handles: dict[Path, tuple[tuple[int, int], _CuFile]] = {}

    def start(
        self, file: BlockFile, slots: SlotIds, rows: Rows | torch.Tensor, row_ids: SlotIds, *, writes: bool
    ) -> PendingIO:
        """Begins to move slots; see `SlotIO.start`. Consecutive slots in consecutive rows are one call.

        Raises:
            KernelArgumentError: the rows are not in GPU memory, or not contiguous.
        """
        if (
            not isinstance(rows, torch.Tensor)
            or rows.dtype != torch.uint8
            or rows.dim() != 2
            or not rows.is_contiguous()
        ):
            raise KernelArgumentError(
                "rows for GPUDirect Storage must be a contiguous uint8 tensor [num_rows, slot_bytes]"
            )
        pending = _PendingKvikio(slots.size, writes=writes)
        if not slots.size:
            return pending
        try:
            handle = self._handle(file)
        except (OSError, RuntimeError) as error:
            pending.fail(error, slots.size)
            return pending
        order = np.argsort(slots, kind="stable")
        slots, row_ids = slots[order], row_ids[order]
        breaks = np.flatnonzero((np.diff(slots) != 1) | (np.diff(row_ids) != 1)) + 1
        for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), slots.size], strict=True):
            memory = rows[int(row_ids[start]) : int(row_ids[start]) + stop - start]
            try:
                call = handle.pwrite if writes else handle.pread
                future = call(memory, memory.numel(), int(slots[start]) * rows.shape[1])
            except (OSError, RuntimeError) as error:
                pending.fail(error, stop - start)
            else:
                pending.add(future, order[start:stop], memory)
        return pending

    def close(self) -> None:
        """Closes the file handles. Idempotent."""
        with self._lock:
            handles, self._handles = self._handles, {}
        for _, handle in handles.values():
            handle.close()

    def _handle(self, file: BlockFile) -> _CuFile:
        """A handle of the very file that `file` has open, not of one that has taken its name."""
        status = os.fstat(file.fd)
        wanted = (status.st_dev, status.st_ino)
        with self._lock:
            known = self._handles.get(file.path)
            if known and known[0] == wanted:
                return known[1]
            at_path = file.path.stat()
            if (at_path.st_dev, at_path.st_ino) != wanted:
                raise FileNotFoundError(f"{file.path} is another file now")
            handle = self._kvikio.open(file.path)
            if known:
                known[1].close()
            self._handles[file.path] = wanted, handle
            return handle


class _PendingKvikio:
    def __init__(self, num_slots: int, *, writes: bool) -> None:
        self._outcomes = np.zeros(num_slots, dtype=np.bool_)
        self._writes = writes
        self._faults: Counter[str] = Counter()
        self._calls: list[tuple[_Future, SlotIds, torch.Tensor]] = []

    def add(self, future: _Future, positions: SlotIds, memory: torch.Tensor) -> None:
        self._calls.append((future, positions, memory))

    def fail(self, error: OSError | RuntimeError, num_slots: int) -> None:
        self._faults[fault_kind(error) if isinstance(error, OSError) else "io_error"] += num_slots

    def result(self) -> IOResult:
        for future, positions, memory in self._calls:
            try:
                num_bytes = future.get()
            except (OSError, RuntimeError) as error:
                self.fail(error, positions.size)
                continue
            num_whole = num_bytes // memory.shape[1]
            self._outcomes[positions[:num_whole]] = True
            if num_whole < positions.size:
                self._faults["disk_full" if self._writes else "truncated"] += positions.size - num_whole
        return IOResult(self._outcomes, dict(self._faults))


class _Installed:
    """kvikio itself."""

    def __init__(self, module: object, defaults: object, driver: object) -> None:
        self._module, self._defaults, self._driver = module, defaults, driver

    def open(self, path: Path) -> _CuFile:
        return cast(_CuFile, self._module.CuFile(path, "r+"))  # type: ignore[attr-defined]

    def is_compat_mode(self) -> bool:
        if self._defaults.is_compat_mode_preferred():  # type: ignore[attr-defined]
            return True
        return not self._driver.get("is_gds_available")  # type: ignore[attr-defined]


@contextlib.contextmanager
def _proof_file(folder: Path) -> Iterator[Path]:
    path = folder / "direct.probe"
    path.unlink(missing_ok=True)  # left by a crash
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _PROOF_BYTES)
        yield path
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            path.unlink()


def _round_trip(path: Path, device: torch.device, kvikio: Kvikio) -> GdsProof:
    content = torch.frombuffer(bytearray(os.urandom(_PROOF_BYTES)), dtype=torch.uint8)
    written = torch.empty_like(content, device=device).copy_(content)
    back = torch.zeros_like(written)
    with contextlib.closing(kvikio.open(path)) as handle:
        num_written = handle.pwrite(written, _PROOF_BYTES, 0).get()
        num_read = handle.pread(back, _PROOF_BYTES, 0).get()
    if num_written != _PROOF_BYTES or num_read != _PROOF_BYTES:
        return GdsProof(False, f"of {_PROOF_BYTES} bytes {num_written} were written and {num_read} read back")
    if not torch.equal(back.cpu(), content):
        return GdsProof(False, "the GPU did not get back what it wrote")
    if path.read_bytes() != content.numpy().tobytes():
        return GdsProof(False, "the file does not hold what the GPU wrote")
    return GdsProof(True, "written from the GPU, read back to GPU and host, and compared")
