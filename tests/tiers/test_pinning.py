"""Registering rows with CUDA, against a runtime that only takes notes."""

from types import SimpleNamespace

import pytest
import torch

from dynamo.kernels.checks import Rows
from dynamo.tiers import pinning
from dynamo.tiers.arena import map_rows
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.pinning import PinnedRows


class Runtime:
    """Keeps what is registered as (first row, number of rows); refuses when `room` is used up."""

    def __init__(self, rows: Rows) -> None:
        self.registered: dict[int, int] = {}
        self.room = 10**9
        self._rows = rows

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if sum(self.registered.values()) + num_bytes // self._rows.shape[1] > self.room:
            return 2
        assert flags == 3
        self.registered[(address - self._rows.ctypes.data) // self._rows.shape[1]] = num_bytes // self._rows.shape[1]
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[(address - self._rows.ctypes.data) // self._rows.shape[1]]
        return 0


def launch_that_fails(*_: object, **__: object) -> None:
    """What a failed registration does to the next kernel launch."""
    raise RuntimeError("CUDA error: invalid argument")


@pytest.fixture
def rows(layout: BlockLayout) -> Rows:
    return map_rows(layout, 20)


@pytest.fixture
def runtime(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime(rows)
    cuda = SimpleNamespace(is_available=lambda: True, cudart=lambda: runtime, synchronize=lambda: None)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "zeros", launch_that_fails)
    monkeypatch.setattr(pinning, "SEGMENT_BYTES", 4 * rows.shape[1])
    return runtime


def test_rows_that_stay_are_one_registration(rows: Rows, runtime: Runtime) -> None:
    pinned = PinnedRows(rows)
    assert not pinned.is_pinned
    assert pinned.add([(0, 18), (18, 20)], can_shrink=False)
    assert pinned.is_pinned
    assert runtime.registered == {0: 20}
    pinned.close()
    pinned.close()
    assert runtime.registered == {}
    assert not pinned.is_pinned


def test_only_resident_rows_are_registered_and_more_can_be_added(rows: Rows, runtime: Runtime) -> None:
    pinned = PinnedRows(rows)
    assert pinned.add([(0, 6), (18, 20)], can_shrink=True)
    assert runtime.registered == {0: 4, 4: 2, 18: 2}
    assert pinned.add([(6, 11)], can_shrink=True)
    assert runtime.registered == {0: 4, 4: 2, 18: 2, 6: 4, 10: 1}


def test_a_segment_in_use_in_part_stays(rows: Rows, runtime: Runtime) -> None:
    pinned = PinnedRows(rows)
    assert pinned.add([(0, 12), (18, 20)], can_shrink=True)
    assert pinned.release(5, 12) == 8, "rows 4 to 7 are one segment"
    assert runtime.registered == {0: 4, 4: 4, 18: 2}
    assert pinned.release(4, 8) == 4
    assert runtime.registered == {0: 4, 18: 2}


def test_a_refusal_at_first_leaves_all_pageable(rows: Rows, runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    pinned = PinnedRows(rows)
    runtime.room = 5
    assert pinned.add([(0, 12)], can_shrink=True)
    assert not pinned.is_pinned
    assert runtime.registered == {}
    assert "could not be pinned (CUDA error 2)" in caplog.text
    assert pinned.release(3, 12) == 3


def test_a_later_refusal_changes_nothing(rows: Rows, runtime: Runtime) -> None:
    pinned = PinnedRows(rows)
    assert pinned.add([(0, 4)], can_shrink=True)
    runtime.room = 9
    assert not pinned.add([(4, 14)], can_shrink=True)
    assert runtime.registered == {0: 4}
    assert pinned.is_pinned


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs a CUDA device")
def test_copies_cross_the_seams_of_registrations(
    layout: BlockLayout, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "SEGMENT_BYTES", 4 * rows.shape[1])
    pinned = PinnedRows(rows)
    assert pinned.add([(0, 20)], can_shrink=True)
    rows[:] = torch.randint(0, 256, rows.shape, dtype=torch.uint8).numpy()
    host = torch.from_numpy(rows)
    on_gpu = host.to("cuda", non_blocking=True)
    back = on_gpu.cpu()
    pinned.close()
    assert torch.equal(back, host)
