"""A disk tier over several directories, and folders that are not what they should be."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from dynamo.kernels.checks import Rows
from dynamo.kernels.digest import digest_rows
from dynamo.tiers.arena import map_rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierBusyError, TierConfigError, TierUnavailableError
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.layout import BlockLayout

NUM_SLOTS = 60


def ids(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    return [tmp_path / name for name in ("a", "b", "c")]


def open_disk(places: list[Path], layout: BlockLayout, fingerprint: bytes = b"model-a.") -> DiskTier:
    return DiskTier.open(places, layout, NUM_SLOTS * layout.slot_bytes, fingerprint, io_threads=2)


def store(tier: DiskTier, slots: npt.NDArray[np.int64], rows: Rows) -> None:
    row_ids = slots % 32
    assert tier.write(slots, rows, row_ids).all()
    digests = digest_rows(rows, row_ids, np.zeros(slots.size, dtype=np.uint64), tier.layout.block_bytes)
    names = [(slot + 1).to_bytes(16, "big") for slot in slots.tolist()]
    assert tier.journal.put(names, [ROOT_NAME] * slots.size, slots, digests)


def readable(tier: DiskTier, rows: Rows) -> list[int]:
    target = map_rows(tier.layout, NUM_SLOTS)
    outcomes = tier.read(np.arange(NUM_SLOTS), target, np.arange(NUM_SLOTS))
    payload = tier.layout.block_bytes
    assert all((target[slot, :payload] == rows[slot % 32, :payload]).all() for slot in np.flatnonzero(outcomes))
    return np.flatnonzero(outcomes).tolist()


def all_but(number: int) -> list[int]:
    return [slot for slot in range(NUM_SLOTS) if slot % 3 != number]


def test_slots_lie_in_turn_in_all_directories_and_come_back_after_a_restart(
    places: list[Path], layout: BlockLayout, rows: Rows
) -> None:
    tier = open_disk(places, layout)
    assert tier.num_slots == NUM_SLOTS
    store(tier, np.random.default_rng(0).permutation(NUM_SLOTS), rows)
    for number, folder in enumerate(tier.folders):
        data = (folder / "blocks.dat").read_bytes()
        assert len(data) == NUM_SLOTS // 3 * layout.slot_bytes
        for place in (0, 7, 19):
            assert data[place * layout.slot_bytes :][: layout.slot_bytes] == rows[(place * 3 + number) % 32].tobytes()
    tier.close()
    tier = open_disk(places, layout)
    assert sorted(tier.recovered.slots.tolist()) == readable(tier, rows) == list(range(NUM_SLOTS))
    assert tier.stats().faults == {}
    tier.close()


def test_every_directory_is_locked(places: list[Path], layout: BlockLayout) -> None:
    tier = open_disk(places, layout)
    with pytest.raises(TierBusyError):
        DiskTier.open(places[2], layout, 1 << 20, b"model-a.")
    tier.close()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_blocks_of_a_missing_directory_are_lost_and_nothing_is_misread(
    places: list[Path], layout: BlockLayout, rows: Rows, number: int
) -> None:
    tier = open_disk(places, layout)
    store(tier, np.arange(NUM_SLOTS), rows)
    tier.close()
    (places[number]).rename(places[number].with_name("elsewhere"))
    tier = open_disk(places, layout)
    assert tier.stats().faults == {"missing": 1}
    assert readable(tier, rows) == ([] if number == 0 else all_but(number))  # the first has the index
    assert tier.recovered.slots.tolist() == readable(tier, rows)
    store(tier, np.arange(NUM_SLOTS), rows)
    tier.close()
    tier = open_disk(places, layout)
    assert readable(tier, rows) == list(range(NUM_SLOTS))
    tier.close()


def test_a_deleted_file_of_several_costs_its_own_slots_only(
    places: list[Path], layout: BlockLayout, rows: Rows
) -> None:
    tier = open_disk(places, layout)
    store(tier, np.arange(NUM_SLOTS), rows)
    (tier.folders[1] / "blocks.dat").unlink()
    assert readable(tier, rows) == all_but(1)
    assert tier.generation == 0
    store(tier, ids(1, 4), rows)
    tier.close()
    tier = open_disk(places, layout)
    assert readable(tier, rows) == sorted([*all_but(1), 1, 4])
    tier.close()


def test_a_cut_file_costs_the_slots_behind_the_cut(places: list[Path], layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk(places, layout)
    store(tier, np.arange(NUM_SLOTS), rows)
    tier.close()
    os.truncate(tier.folders[2] / "blocks.dat", 5 * layout.slot_bytes)
    tier = open_disk(places, layout)
    assert tier.stats().faults == {"truncated": 15}
    assert readable(tier, rows) == [slot for slot in range(NUM_SLOTS) if slot % 3 != 2 or slot // 3 < 5]
    tier.close()


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_exchanged_directories_are_refused_with_the_way_out(
    places: list[Path], layout: BlockLayout, rows: Rows, order: tuple[int, ...]
) -> None:
    tier = open_disk(places, layout)
    store(tier, np.arange(NUM_SLOTS), rows)
    tier.close()
    with pytest.raises(TierUnavailableError, match="give the directories in their old order"):
        open_disk([places[number] for number in order], layout)
    tier = open_disk(places, layout)
    assert readable(tier, rows) == list(range(NUM_SLOTS))
    tier.close()


def test_a_directory_of_another_tier_is_refused_and_left_alone(
    places: list[Path], tmp_path: Path, layout: BlockLayout, rows: Rows
) -> None:
    open_disk(places, layout).close()
    others = [tmp_path / "x", tmp_path / "y", tmp_path / "z"]
    other = open_disk(others, layout)
    store(other, np.arange(NUM_SLOTS), rows)
    other.close()
    with pytest.raises(TierUnavailableError, match="holds directory 2 of 3 of another disk tier"):
        open_disk([places[0], others[1], places[2]], layout)
    other = open_disk(others, layout)
    assert readable(other, rows) == list(range(NUM_SLOTS))
    other.close()


def test_another_number_of_directories_starts_empty(places: list[Path], layout: BlockLayout, rows: Rows) -> None:
    for count, before in ((2, None), (3, 2), (1, 3), (3, 1)):
        tier = open_disk(places[:count], layout)
        assert readable(tier, rows) == []
        assert tier.stats().faults == ({} if before is None else {"restriped": 1})
        store(tier, np.arange(NUM_SLOTS), rows)
        assert readable(tier, rows) == list(range(NUM_SLOTS))
        tier.close()


def test_a_part_of_a_set_is_not_taken_for_a_tier(places: list[Path], layout: BlockLayout) -> None:
    open_disk(places, layout).close()
    with pytest.raises(TierUnavailableError, match="is directory 2 of 3 of a disk tier, not the first"):
        open_disk(places[1:2], layout)


def test_wrong_directories_are_refused(places: list[Path], layout: BlockLayout) -> None:
    link = places[0].with_name("link")
    link.symlink_to(places[0])
    with pytest.raises(TierConfigError, match=f"{link}, which is {places[0]}, is given twice"):
        open_disk([places[0], link], layout)
    with pytest.raises(TierConfigError, match="is given twice"):
        open_disk([places[0], places[0]], layout)
    with pytest.raises(TierConfigError, match="at least one directory"):
        open_disk([], layout)
    with pytest.raises(TierConfigError, match="over 3 directories holds no block of 4096 bytes in each"):
        DiskTier.open(places, layout, 3 * layout.slot_bytes - 1, b"model-a.")


def namespace_of(place: Path) -> Path:
    return place / b"model-a.".hex()


def test_a_folder_of_somebody_else_is_refused_and_not_touched(tmp_path: Path, layout: BlockLayout) -> None:
    folder = namespace_of(tmp_path)
    folder.mkdir()
    (folder / "blocks.dat").write_text("a thesis on blocks")
    with pytest.raises(TierUnavailableError, match=r"holds 'blocks\.dat' but no file STRIPE"):
        open_disk([tmp_path], layout)
    assert [path.name for path in folder.iterdir()] == ["blocks.dat"]
    (folder / "STRIPE").write_text("zebra")
    with pytest.raises(TierUnavailableError, match="belongs to another program: STRIPE begins with b'zebra'"):
        open_disk([tmp_path], layout)
    assert (folder / "blocks.dat").read_text() == "a thesis on blocks"


@pytest.mark.parametrize("name", ["STRIPE", "journal.log"])
def test_another_version_is_refused_and_left_as_it_is(
    tmp_path: Path, layout: BlockLayout, rows: Rows, name: str
) -> None:
    tier = open_disk([tmp_path], layout)
    store(tier, ids(3), rows)
    tier.close()
    path = tier.folder / name
    good = path.read_bytes()
    header = bytearray(good[:72] if name == "STRIPE" else good[:64])
    header[8] = 9
    header[-8:] = xxhash.xxh3_64_intdigest(bytes(header[:-8])).to_bytes(8, "little")
    path.write_bytes(bytes(header) + good[len(header) :])
    newer = path.read_bytes()
    with pytest.raises(TierUnavailableError, match="format version 9"):
        open_disk([tmp_path], layout)
    assert path.read_bytes() == newer
    path.write_bytes(good)
    tier = open_disk([tmp_path], layout)
    assert readable(tier, rows) == [3]
    tier.close()


def test_a_damaged_identity_of_ours_starts_empty(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk([tmp_path], layout)
    store(tier, ids(3), rows)
    tier.close()
    path = tier.folder / "STRIPE"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    tier = open_disk([tmp_path], layout)
    assert tier.stats().faults == {"missing": 1}
    assert readable(tier, rows) == []
    tier.close()


@pytest.mark.parametrize("count", [1, 3])
def test_a_tier_shrinks_and_grows_while_in_use(places: list[Path], layout: BlockLayout, rows: Rows, count: int) -> None:
    tier = open_disk(places[:count], layout)
    store(tier, np.arange(NUM_SLOTS), rows)
    tier.resize(20)
    assert tier.num_slots == 20
    sizes = [(folder / "blocks.dat").stat().st_size // layout.slot_bytes for folder in tier.folders]
    assert sizes == ([20] if count == 1 else [7, 7, 6])
    tier.journal.check_invariants()
    tier.resize(NUM_SLOTS)
    assert readable(tier, rows) == list(range(20))
    store(tier, np.arange(40, NUM_SLOTS), rows)
    assert readable(tier, rows) == [*range(20), *range(40, NUM_SLOTS)]
    tier.resize(NUM_SLOTS + 3)
    assert tier.write(ids(NUM_SLOTS + 2), rows, ids(0)).all()
    tier.resize(NUM_SLOTS)
    tier.close()
    tier = open_disk(places[:count], layout)
    assert readable(tier, rows) == [*range(20), *range(40, NUM_SLOTS)]
    assert sorted(tier.recovered.slots.tolist()) == readable(tier, rows)
    with pytest.raises(TierConfigError, match="leaves a directory empty"):
        tier.resize(count - 1)
    tier.close()
