"""Vectored slot I/O, by threads and by the kernel's queue: merging, and what becomes of each slot when the file misbehaves."""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import numpy.typing as npt
import pytest

from dynamo.kernels.checks import KernelArgumentError, Rows, SlotIds
from dynamo.tiers.aio import READ, Events, RequestQueue, Requests
from dynamo.tiers.arena import map_rows
from dynamo.tiers.block_file import BlockFile
from dynamo.tiers.file_io import FileIO
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.queued_io import QueuedIO
from dynamo.tiers.slot_io import IOResult, SlotIO

NUM_SLOTS = 32
Call = Callable[[int, list[memoryview], int], int]


def ids(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


@pytest.fixture
def block_file(tmp_path: Path) -> Iterator[BlockFile]:
    file = BlockFile(tmp_path / "blocks.dat")
    yield file
    file.close()


class CallingQueue(RequestQueue):
    """Makes each request at once, by `os.preadv` or `os.pwritev`, and gives events in reverse order."""

    def __init__(self, depth: int) -> None:
        self.depth = min(depth, 4)
        self._done: list[tuple[int, int, int, int]] = []

    def submit(self, requests: Requests, start: int, stop: int) -> int:
        assert len(self._done) + stop - start <= self.depth
        for request in requests[start:stop]:
            call = os.preadv if request["operation"] == READ else os.pwritev
            vectors = (ctypes.c_uint64 * (2 * int(request["num_vectors"]))).from_address(int(request["vectors"]))
            pieces = [
                memoryview((ctypes.c_char * size).from_address(address)).cast("B")
                for address, size in zip(vectors[::2], vectors[1::2], strict=True)
            ]
            try:
                result = call(int(request["fd"]), pieces, int(request["offset"]))
            except OSError as error:
                assert error.errno
                result = -error.errno
            self._done.append((int(request["data"]), 0, result, 0))
        return stop - start

    def wait(self, count: int) -> Events:
        ended, self._done = self._done[::-1][:count], self._done[::-1][count:][::-1]
        names = ["data", "request", "result", "result2"]
        return np.array(ended, dtype=np.dtype({"names": names, "formats": ["<u8", "<u8", "<i8", "<i8"]}))

    def close(self) -> None:
        assert not self._done


class Blocking:
    """Any back-end, waited for."""

    def __init__(self, io: SlotIO) -> None:
        self.io = io
        self.close = io.close

    def read(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> IOResult:
        return self.io.start(file, slots, rows, row_ids, writes=False).result()

    def write(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> IOResult:
        return self.io.start(file, slots, rows, row_ids, writes=True).result()


@pytest.fixture(params=["threads", "kernel-queue", "queue-of-calls"])
def back_end(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def file_io_pool(back_end: str) -> Iterator[Blocking]:
    """Threads; the kernel's queue; and a queue whose requests are calls of `os`, which a test may replace."""
    io: SlotIO = FileIO(3) if back_end == "threads" else QueuedIO(3)
    if back_end == "queue-of-calls":
        io = QueuedIO(3, CallingQueue)
    yield Blocking(io)
    io.close()


patches_calls = pytest.mark.parametrize("back_end", ["threads", "queue-of-calls"], indirect=True)


def fill(file: BlockFile, rows: Rows) -> bytes:
    """Lays other random bytes into the file's slots, not through FileIO."""
    content = np.random.default_rng(5).bytes(NUM_SLOTS * rows.shape[1])
    file.path.write_bytes(content)
    return content


def slot_bytes_of(content: bytes, slot: int, rows: Rows) -> bytes:
    return content[slot * rows.shape[1] : (slot + 1) * rows.shape[1]]


def test_scattered_slots_and_rows_arrive_whole(block_file: BlockFile, file_io_pool: Blocking, rows: Rows) -> None:
    content = fill(block_file, rows)
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 32):
        slots, row_ids = rng.permutation(NUM_SLOTS)[:n], rng.permutation(32)[:n]
        assert file_io_pool.read(block_file, slots, rows, row_ids).outcomes.all()
        for slot, row in zip(slots.tolist(), row_ids.tolist(), strict=True):
            assert rows[row].tobytes() == slot_bytes_of(content, slot, rows)


@patches_calls
def test_consecutive_slots_are_one_call_whatever_their_rows(
    block_file: BlockFile, file_io_pool: Blocking, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(block_file, rows)
    calls: list[tuple[int, int]] = []
    preadv = os.preadv

    def counting(fd: int, vectors: list[memoryview], offset: int) -> int:
        calls.append((offset // rows.shape[1], sum(map(len, vectors)) // rows.shape[1]))
        return preadv(fd, vectors, offset)

    monkeypatch.setattr(os, "preadv", counting)
    file_io_pool.read(block_file, ids(9, 4, 3, 8, 5), rows, ids(20, 11, 10, 30, 12))
    assert sorted(calls) == [(3, 3), (8, 2)]


def test_large_runs_are_shared_out_among_threads(tmp_path: Path, file_io_pool: Blocking) -> None:
    layout = BlockLayout(num_layers=8, block_size=16, num_kv_heads=8, head_dim=64, itemsize=4)  # 512 KiB slots
    rows = map_rows(layout, 24)
    rows[:] = np.random.default_rng(0).integers(0, 256, rows.shape, dtype=np.uint8)
    source = rows.copy()
    file = BlockFile(tmp_path / "large.dat")
    order = np.random.default_rng(1).permutation(24)
    assert file_io_pool.write(file, order, rows, np.arange(24)).outcomes.all()
    rows[:] = 0
    assert file_io_pool.read(file, np.arange(24), rows, np.arange(24)).outcomes.all()
    assert (rows == source[np.argsort(order)]).all()
    file.close()


def test_slots_past_the_end_are_truncated_and_those_before_are_good(
    block_file: BlockFile, file_io_pool: Blocking, rows: Rows
) -> None:
    content = fill(block_file, rows)
    os.truncate(block_file.path, 10 * rows.shape[1] + 1000)
    result = file_io_pool.read(block_file, ids(8, 9, 10, 11, 30), rows, ids(0, 1, 2, 3, 4))
    assert result.outcomes.tolist() == [True, True, False, False, False]
    assert result.faults == {"truncated": 3}
    assert rows[1].tobytes() == slot_bytes_of(content, 9, rows)


def patched(monkeypatch: pytest.MonkeyPatch, name: str, wrap: Callable[[Call], Call]) -> None:
    monkeypatch.setattr(os, name, wrap(getattr(os, name)))


def cut_short(call: Call) -> Call:
    """Moves a page of every call, and an odd number of bytes of every third."""
    num_calls = 0

    def short(fd: int, vectors: list[memoryview], offset: int) -> int:
        nonlocal num_calls
        num_calls += 1
        moved = call(fd, [vectors[0][:4096]], offset)
        return 4096 * 3 // 4 if call is os_pwritev and num_calls % 3 == 0 else moved

    return short


os_pwritev = os.pwritev


@patches_calls
def test_short_calls_are_continued(
    block_file: BlockFile, file_io_pool: Blocking, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = fill(block_file, rows)
    source = rows.copy()
    patched(monkeypatch, "preadv", cut_short)
    patched(monkeypatch, "pwritev", cut_short)
    row_ids = np.random.default_rng(2).permutation(32)[:6]
    assert file_io_pool.read(block_file, np.arange(3, 9), rows, row_ids).outcomes.all()
    assert b"".join(rows[row].tobytes() for row in row_ids) == content[3 * rows.shape[1] : 9 * rows.shape[1]]
    rows[:] = source
    assert file_io_pool.write(block_file, np.arange(3, 9), rows, row_ids).outcomes.all()
    written = block_file.path.read_bytes()[3 * rows.shape[1] : 9 * rows.shape[1]]
    assert written == source[row_ids].tobytes()


def failing_at(slot: int, code: int, slot_bytes: int) -> Callable[[Call], Call]:
    def wrap(call: Call) -> Call:
        def fail(fd: int, vectors: list[memoryview], offset: int) -> int:
            end = offset + sum(len(vector) for vector in vectors)
            if offset < (slot + 1) * slot_bytes and end > slot * slot_bytes:
                raise OSError(code, os.strerror(code))
            return call(fd, vectors, offset)

        return fail

    return wrap


@patches_calls
def test_a_bad_sector_fails_only_its_slot(
    block_file: BlockFile, file_io_pool: Blocking, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = fill(block_file, rows)
    patched(monkeypatch, "preadv", failing_at(6, errno.EIO, rows.shape[1]))
    result = file_io_pool.read(block_file, ids(4, 5, 6, 7), rows, ids(0, 1, 2, 3))
    assert result.outcomes.tolist() == [True, True, False, True]
    assert result.faults == {"io_error": 1}
    assert rows[3].tobytes() == slot_bytes_of(content, 7, rows)


@patches_calls
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EFBIG, "disk_full"),
        (errno.EDQUOT, "quota_exceeded"),
        (errno.EROFS, "read_only"),
        (errno.EACCES, "no_permission"),
        (errno.EPERM, "no_permission"),
    ],
)
def test_a_refused_write_fails_the_slots_not_written(
    block_file: BlockFile, file_io_pool: Blocking, rows: Rows, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    patched(monkeypatch, "pwritev", failing_at(6, code, rows.shape[1]))
    result = file_io_pool.write(block_file, ids(2, 6, 7), rows, ids(0, 1, 2))
    assert result.outcomes.tolist() == [True, False, False]
    assert result.faults == {kind: 2}


@patches_calls
def test_refused_direct_io_goes_on_buffered_and_is_counted_once(
    block_file: BlockFile, file_io_pool: Blocking, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not block_file.is_direct:
        pytest.skip("this file system has no O_DIRECT to be refused")
    content = fill(block_file, rows)

    def refuse_direct(call: Call) -> Call:
        def refuse(fd: int, vectors: list[memoryview], offset: int) -> int:
            if block_file.is_direct:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return call(fd, vectors, offset)

        return refuse

    patched(monkeypatch, "preadv", refuse_direct)
    result = file_io_pool.read(block_file, ids(1, 9, 17), rows, ids(0, 1, 2))
    assert result.outcomes.all()
    assert result.faults == {"direct_refused": 1}
    assert not block_file.is_direct
    assert rows[2].tobytes() == slot_bytes_of(content, 17, rows)
    assert file_io_pool.read(block_file, ids(1), rows, ids(0)).faults == {}


def test_a_file_system_without_direct_io_is_used_buffered(
    tmp_path: Path, file_io_pool: Blocking, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def no_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", no_direct)
    file = BlockFile(tmp_path / "buffered.dat")
    assert not file.is_direct
    assert file_io_pool.write(file, ids(3), rows, ids(4)).outcomes.all()
    assert file_io_pool.read(file, ids(3), rows, ids(5)).outcomes.all()
    assert (rows[4] == rows[5]).all()
    file.close()


def test_unaligned_rows_are_refused(block_file: BlockFile, file_io_pool: Blocking, rows: Rows) -> None:
    unaligned = rows.reshape(-1)[512 : 512 + 8192].reshape(2, 4096)
    with pytest.raises(KernelArgumentError, match="must start at a page"):
        file_io_pool.read(block_file, ids(0), unaligned, ids(0))


def test_callers_take_turns_and_finish_after_close(block_file: BlockFile, file_io_pool: Blocking, rows: Rows) -> None:
    content = fill(block_file, rows)
    start = Barrier(5)

    def read(part: int) -> bool:
        slots = np.arange(part, NUM_SLOTS, 4)
        start.wait(10)
        return bool(file_io_pool.read(block_file, slots, rows, slots).outcomes.all())

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(read, part) for part in range(4)]
        start.wait(10)
        file_io_pool.close()
        assert all(result.result(10) for result in results)
    assert rows.tobytes() == content
