"""Fixtures for the tiers: a small padded layout, page-aligned rows, and every tier opened with known content."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo.kernels.checks import Rows, check_rows
from dynamo.tiers.arena import map_rows
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.fake_kvikio import FakeKvikio
from dynamo.tiers.file_io import FileIO
from dynamo.tiers.host import HostTier
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.queued_io import QueuedIO
from dynamo.tiers.slot_io import SlotIO
from dynamo.tiers.tier import Tier

NUM_SLOTS = 24
FINGERPRINT = b"a model, a layout"


@dataclass(frozen=True, slots=True)
class OpenTier:
    """A tier and a way to see a slot's payload that does not go through the tier's own methods."""

    tier: Tier
    stored: Callable[[int], bytes]


@pytest.fixture
def layout() -> BlockLayout:
    """1,920 bytes of payload in slots of 4,096, so that padding is there to be got wrong."""
    return BlockLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=10, itemsize=4)


@pytest.fixture
def rows(layout: BlockLayout) -> Rows:
    """Random page-aligned rows, uint8 [32, slot_bytes]."""
    rows = map_rows(layout, 32)
    rows[:] = np.random.default_rng(0).integers(0, 256, rows.shape, dtype=np.uint8)
    return rows


@pytest.fixture
def contents(layout: BlockLayout) -> list[bytes]:
    """What `open_tier` finds in its slots, [NUM_SLOTS] payloads."""
    return [np.random.default_rng(100 + i).bytes(layout.block_bytes) for i in range(NUM_SLOTS)]


@pytest.fixture(params=["device", "host", "disk", "disk-by-threads", "disk-by-gds"])
def open_tier(
    request: pytest.FixtureRequest, layout: BlockLayout, contents: list[bytes], tmp_path: Path
) -> Iterator[OpenTier]:
    """Each tier in turn, with `contents` laid into its slots behind its back."""
    open_it = {
        "device": _open_device,
        "host": _open_host,
        "disk": _open_disk,
        "disk-by-threads": _open_disk_by_threads,
        "disk-by-gds": _open_disk_by_gds,
    }
    opened = open_it[request.param](layout, contents, tmp_path)
    yield opened
    opened.tier.close()


def _open_device(layout: BlockLayout, contents: list[bytes], _: Path) -> OpenTier:
    tier = DeviceTier(layout, torch.float32, NUM_SLOTS, "cpu")
    planes = [plane for i in range(layout.num_layers) for plane in tier.layer(i)]
    for slot, payload in enumerate(contents):
        parts = torch.from_numpy(np.frombuffer(payload, dtype=np.int32).copy()).view(len(planes), *planes[0].shape[1:])
        for plane, part in zip(planes, parts, strict=True):
            plane.view(torch.int32)[slot] = part  # as integers: random bytes need not be good floats

    def stored(slot: int) -> bytes:
        return b"".join(plane[slot].contiguous().view(torch.uint8).numpy().tobytes() for plane in planes)

    return OpenTier(tier, stored)


def _open_host(layout: BlockLayout, contents: list[bytes], _: Path) -> OpenTier:
    tier = HostTier(layout, NUM_SLOTS)
    rows = tier.rows
    for slot, payload in enumerate(contents):
        rows[slot, : layout.block_bytes] = np.frombuffer(payload, dtype=np.uint8)
    return OpenTier(tier, lambda slot: rows[slot, : layout.block_bytes].tobytes())


class _DirectDisk(DiskTier):
    """Moves its blocks by the calls for device memory, for which host memory stands."""

    def read(self, slots, rows, row_ids):  # type: ignore[no-untyped-def, override]
        check_rows(rows, "rows", writable=True)
        return self.read_device(slots, torch.from_numpy(rows), row_ids)

    def write(self, slots, rows, row_ids):  # type: ignore[no-untyped-def]
        check_rows(rows, "rows")
        return self.write_device(slots, torch.from_numpy(rows.copy()), row_ids)


def _open_disk_by_gds(layout: BlockLayout, contents: list[bytes], directory: Path) -> OpenTier:
    opened = _open_disk(layout, contents, directory, kind=_DirectDisk)
    assert isinstance(opened.tier, DiskTier)
    assert all(proof.ok for proof in opened.tier.prove_gds(torch.device("cpu"), FakeKvikio()))
    return opened


def _open_disk_by_threads(layout: BlockLayout, contents: list[bytes], directory: Path) -> OpenTier:
    return _open_disk(layout, contents, directory, FileIO)


def _open_disk(
    layout: BlockLayout,
    contents: list[bytes],
    directory: Path,
    new_io: Callable[[int], SlotIO] = QueuedIO,
    kind: type[DiskTier] = DiskTier,
) -> OpenTier:
    capacity_bytes = NUM_SLOTS * layout.slot_bytes
    with_index = DiskTier.open(directory, layout, capacity_bytes, FINGERPRINT)
    names = [slot.to_bytes(16, "little") for slot in range(1, NUM_SLOTS + 1)]
    slots, digests = np.arange(NUM_SLOTS), np.zeros(NUM_SLOTS, dtype=np.uint64)
    assert with_index.journal.put(names, [ROOT_NAME] * NUM_SLOTS, slots, digests)
    with_index.close()
    blocks = with_index.folder / "blocks.dat"
    blocks.write_bytes(b"".join(payload.ljust(layout.slot_bytes, b"\0") for payload in contents))
    tier = kind.open(directory, layout, capacity_bytes, FINGERPRINT, new_io=new_io)

    def stored(slot: int) -> bytes:
        return blocks.read_bytes()[slot * layout.slot_bytes :][: layout.block_bytes]

    return OpenTier(tier, stored)
