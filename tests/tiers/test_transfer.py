"""The strategy table, cell by cell, also by moving bytes; and what a transfer tells and keeps."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo.kernels.checks import Rows
from dynamo.kernels.copy import copy_rows
from dynamo.tiers.arena import map_rows
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.host import HostTier
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.tier import Outcomes
from dynamo.tiers.transfer import STRATEGIES, Capabilities, Direct, Medium, Transfer, TwoHops, Unsupported, route

NONE, GDS, RDMA, BOTH = (Capabilities(gds=g, gpu_rdma=r) for r in (False, True) for g in (False, True))
ONE, TWO = "one hop", "two hops"

# source, destination, then the way with: nothing, GDS, GPU-RDMA, both
EXPECTED = [
    ("system", "system", ONE, ONE, ONE, ONE),
    ("system", "pinned", ONE, ONE, ONE, ONE),
    ("system", "device", ONE, ONE, ONE, ONE),
    ("system", "disk", ONE, ONE, ONE, ONE),
    ("system", "remote", ONE, ONE, ONE, ONE),
    ("pinned", "system", ONE, ONE, ONE, ONE),
    ("pinned", "pinned", ONE, ONE, ONE, ONE),
    ("pinned", "device", ONE, ONE, ONE, ONE),
    ("pinned", "disk", ONE, ONE, ONE, ONE),
    ("pinned", "remote", ONE, ONE, ONE, ONE),
    ("device", "system", ONE, ONE, ONE, ONE),
    ("device", "pinned", ONE, ONE, ONE, ONE),
    ("device", "device", ONE, ONE, ONE, ONE),
    ("device", "disk", TWO, ONE, TWO, ONE),
    ("device", "remote", TWO, TWO, ONE, ONE),
    ("disk", "system", ONE, ONE, ONE, ONE),
    ("disk", "pinned", ONE, ONE, ONE, ONE),
    ("disk", "device", TWO, ONE, TWO, ONE),
    ("disk", "disk", TWO, TWO, TWO, TWO),
    ("disk", "remote", TWO, TWO, TWO, TWO),
    ("remote", "system", ONE, ONE, ONE, ONE),
    ("remote", "pinned", ONE, ONE, ONE, ONE),
    ("remote", "device", TWO, TWO, ONE, ONE),
    ("remote", "disk", TWO, TWO, TWO, TWO),
    ("remote", "remote", None, None, None, None),
]


@pytest.mark.parametrize("cell", EXPECTED, ids=lambda cell: f"{cell[0]}-{cell[1]}")
def test_every_cell_has_its_way(cell: tuple[str, str, str, str, str, str]) -> None:
    source, destination, *ways = cell
    for capabilities, way in zip((NONE, GDS, RDMA, BOTH), ways, strict=True):
        found = route(Medium(source), Medium(destination), capabilities)
        if way is None:
            assert isinstance(found, Unsupported)
            assert found.reason
        else:
            assert found == (Direct() if way is ONE else TwoHops(Medium.PINNED))


def test_the_table_has_every_cell_once() -> None:
    assert set(STRATEGIES) == {(source, destination) for source in Medium for destination in Medium}
    assert {(Medium(cell[0]), Medium(cell[1])) for cell in EXPECTED} == set(STRATEGIES)


NUM_BLOCKS = 6
HOST = (Medium.SYSTEM, Medium.PINNED)


class Fabric:
    """Two of each medium that this machine has; the device is in CPU memory, and pinned memory is the host tier's."""

    def __init__(self, layout: BlockLayout, folder: Path, stack: ExitStack) -> None:
        self.layout = layout
        self.num_hops = 0
        self._sides: dict[Medium, list[Rows | DeviceTier | DiskTier]] = {medium: [] for medium in Medium}
        for side in range(2):
            disk = DiskTier.open(folder / str(side), layout, NUM_BLOCKS * layout.slot_bytes, b"a model, a layout")
            device = DeviceTier(layout, torch.float32, NUM_BLOCKS, "cpu")
            host = HostTier(layout, NUM_BLOCKS)
            for tier in (disk, device, host):
                stack.callback(tier.close)
            self._sides[Medium.SYSTEM].append(map_rows(layout, NUM_BLOCKS))
            self._sides[Medium.PINNED].append(host.rows)
            self._sides[Medium.DEVICE].append(device)
            self._sides[Medium.DISK].append(disk)

    def hop(self, source: Medium, src_ids: np.ndarray, destination: Medium, dst_ids: np.ndarray) -> None:
        """From the first of `source` to the second of `destination`, in one move."""
        self.num_hops += 1
        src, dst = self._sides[source][0], self._sides[destination][1]
        if isinstance(src, np.ndarray) and isinstance(dst, np.ndarray):
            copy_rows(src, src_ids, dst, dst_ids)
        elif isinstance(src, np.ndarray):
            assert dst.write(dst_ids, src, src_ids).all()  # type: ignore[union-attr]
        elif isinstance(dst, np.ndarray):
            assert src.read(src_ids, dst, dst_ids).all()
        else:
            assert isinstance(src, DeviceTier), "only a device moves blocks to its like"
            assert isinstance(dst, DeviceTier)
            for layer in range(self.layout.num_layers):
                for mine, theirs in zip(src.layer(layer), dst.layer(layer), strict=True):
                    theirs[torch.from_numpy(dst_ids)] = mine[torch.from_numpy(src_ids)]

    def turn(self, medium: Medium) -> None:
        """Makes the second of a medium the first."""
        self._sides[medium].reverse()

    def put(self, medium: Medium, ids: np.ndarray, rows: Rows) -> None:
        """Lays blocks into the first of a medium."""
        side = self._sides[medium][0]
        if isinstance(side, np.ndarray):
            side[ids] = rows[: len(ids)]
        else:
            assert side.write(ids, rows, np.arange(len(ids))).all()

    def get(self, medium: Medium, ids: np.ndarray) -> Rows:
        """Blocks from the second of a medium."""
        rows = map_rows(self.layout, NUM_BLOCKS)
        side = self._sides[medium][1]
        if isinstance(side, np.ndarray):
            rows[: len(ids)] = side[ids]
        else:
            assert side.read(ids, rows, np.arange(len(ids))).all()
        return rows[: len(ids), : self.layout.block_bytes]


@pytest.fixture
def fabric(layout: BlockLayout, tmp_path: Path) -> Iterator[Fabric]:
    with ExitStack() as stack:
        yield Fabric(layout, tmp_path, stack)


LOCAL = [medium for medium in Medium if medium is not Medium.REMOTE]


@pytest.mark.parametrize("destination", LOCAL)
@pytest.mark.parametrize("source", LOCAL)
def test_blocks_arrive_whole_on_the_way_that_the_table_gives(
    fabric: Fabric, rows: Rows, layout: BlockLayout, source: Medium, destination: Medium
) -> None:
    src_ids, via_ids, dst_ids = np.array([4, 0, 2]), np.array([1, 5, 3]), np.array([0, 1, 5])
    fabric.put(source, src_ids, rows)
    match route(source, destination, NONE):
        case Direct():
            fabric.hop(source, src_ids, destination, dst_ids)
            num_hops = 1
        case TwoHops(via):
            fabric.hop(source, src_ids, via, via_ids)
            fabric.turn(via)
            fabric.hop(via, via_ids, destination, dst_ids)
            num_hops = 2
    assert (fabric.get(destination, dst_ids) == rows[:3, : layout.block_bytes]).all()
    assert fabric.num_hops == num_hops


def arrive(transfer: Transfer, *positions: int) -> bool:
    return transfer.deliver(np.array(positions, dtype=np.int64), lambda wanted: wanted[wanted])


def test_what_arrived_is_counted_from_the_front() -> None:
    transfer = Transfer(5, 10)
    arrive(transfer, 1, 3)
    assert transfer.num_leading == 0
    arrive(transfer, 0)
    assert transfer.num_leading == 2
    assert transfer.arrived.tolist() == [True, True, False, True, False]
    transfer.finish()
    assert transfer.wait() == 2
    assert not transfer.is_expired


def test_progress_is_told_each_time_blocks_arrive_and_to_late_comers() -> None:
    transfer = Transfer(4, 10)
    early: list[list[bool]] = []
    late: list[list[bool]] = []
    transfer.on_progress(lambda: early.append(transfer.arrived.tolist()))
    arrive(transfer, 1)
    transfer.deliver(np.array([0]), lambda wanted: ~wanted)  # could not be written: no progress
    transfer.on_progress(lambda: late.append(transfer.arrived.tolist()))
    arrive(transfer, 2, 3)
    assert early == [[False, True, False, False], [False, True, True, True]]
    assert late == early


def test_below_the_floor_nothing_is_written_any_more() -> None:
    transfer = Transfer(6, 10)
    written: list[list[bool]] = []

    def write(wanted: Outcomes) -> Outcomes:
        written.append(wanted.tolist())
        return wanted[wanted]

    arrive(transfer, 0)
    transfer.raise_floor(3)
    transfer.raise_floor(1)  # it only rises
    assert transfer.floor == 3
    assert not transfer.deliver(np.array([1, 2]), write)
    assert transfer.deliver(np.array([2, 3, 4]), write)
    assert written == [[False, True, True]]
    assert transfer.arrived.tolist() == [True, False, False, True, True, False]


def test_raising_the_floor_waits_for_last_hops_below_it_and_for_no_others() -> None:
    transfer = Transfer(4, 10)
    both_run, below, above = threading.Barrier(3), threading.Event(), threading.Event()

    def write(go_on: threading.Event, wanted: Outcomes) -> Outcomes:
        both_run.wait(10)
        assert go_on.wait(10)
        return wanted

    hops = [
        threading.Thread(target=transfer.deliver, args=(np.array([position]), partial(write, go_on)))
        for position, go_on in ((1, below), (3, above))
    ]
    for hop in hops:
        hop.start()
    both_run.wait(10)
    raising = threading.Thread(target=transfer.raise_floor, args=(2,))
    raising.start()
    raising.join(0.05)
    assert raising.is_alive()
    below.set()
    raising.join(10)
    assert not raising.is_alive()
    assert transfer.arrived.tolist() == [False, True, False, False]
    above.set()
    for hop in hops:
        hop.join(10)
    assert transfer.arrived.tolist() == [False, True, False, True]


def test_a_deadline_moves_only_further_away() -> None:
    transfer = Transfer(1, 60)
    before = transfer.deadline
    transfer.extend(before - 30)
    assert transfer.deadline == before
    transfer.extend(before + 30)
    assert transfer.deadline == before + 30


def test_waiting_honours_a_deadline_that_moved_meanwhile() -> None:
    transfer = Transfer(2, 0.05)
    transfer.on_progress(lambda: transfer.extend(time.monotonic() + 30))
    arrive(transfer, 0)
    timer = threading.Timer(0.2, lambda: (arrive(transfer, 1), transfer.finish()))
    timer.start()
    assert transfer.wait() == 2
    timer.join()


@pytest.mark.parametrize("end", [Transfer.expire, Transfer.cancel], ids=["expire", "cancel"])
def test_after_the_end_nothing_is_written(end: Callable[[Transfer], None]) -> None:
    transfer = Transfer(2, 10)
    end(transfer)
    assert not arrive(transfer, 0)
    assert transfer.wait() == 0
    assert transfer.is_ended
    assert transfer.is_expired == (end is Transfer.expire)


def test_the_end_waits_for_last_hops_under_way_and_those_run_side_by_side() -> None:
    transfer = Transfer(2, 10)
    both_run, go_on = threading.Barrier(3), threading.Event()

    def write(_: Outcomes) -> Outcomes:
        both_run.wait(10)
        assert go_on.wait(10)
        return np.ones(1, dtype=np.bool_)

    hops = [threading.Thread(target=transfer.deliver, args=(np.array([i]), write)) for i in range(2)]
    for hop in hops:
        hop.start()
    both_run.wait(10)
    ending = threading.Thread(target=transfer.cancel)
    ending.start()
    assert not transfer.is_ended
    go_on.set()
    for thread in (ending, *hops):
        thread.join(10)
    assert transfer.is_ended
    assert transfer.num_leading == 2


def test_listeners_to_the_end_are_called_once_and_a_failing_one_does_not_keep_it_from_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transfer = Transfer(1, 10)
    called: list[str] = []

    def fail() -> None:
        raise ValueError("a listener's fault")

    transfer.when_ended(fail)
    transfer.when_ended(lambda: called.append("before"))
    transfer.finish()
    transfer.cancel()
    transfer.when_ended(lambda: called.append("after"))
    assert called == ["before", "after"]
    assert "a listener to the end" in caplog.text


def test_a_failing_last_hop_counts_as_not_arrived() -> None:
    transfer = Transfer(1, 10)

    def fail(_: Outcomes) -> Outcomes:
        raise ValueError("the device is gone")

    with pytest.raises(ValueError, match="gone"):
        transfer.deliver(np.array([0]), fail)
    transfer.finish()
    assert transfer.wait() == 0
