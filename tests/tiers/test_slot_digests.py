"""Digests of both kinds: what they find, and that the device makes the same as the CPU."""

import numpy as np
import pytest
import torch

from dynamo.kernels.checks import Rows
from dynamo.kernels.digest import digest_rows
from dynamo.tiers.arena import map_rows
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.slot_digests import DigestKind, digest_slots, match_digests, stored_kinds

IDS = np.array([7, 0, 31, 4])
SEEDS = np.array([1, 2, 3, 4], dtype=np.uint64)


def digests_of(rows: Rows, num_bytes: int, kind: DigestKind) -> np.ndarray:
    if kind == DigestKind.XXH3:
        return digest_rows(rows, IDS, SEEDS, num_bytes)
    return digest_slots(torch.from_numpy(rows), IDS, SEEDS, num_bytes).numpy()


@pytest.mark.parametrize("kind", DigestKind)
def test_every_byte_and_the_seed_count_and_the_padding_does_not(
    layout: BlockLayout, rows: Rows, kind: DigestKind
) -> None:
    size = layout.block_bytes
    digests, kinds = digests_of(rows, size, kind), np.full(4, kind, dtype=np.uint8)
    rows[IDS, size:] ^= 1
    assert match_digests(rows, IDS, SEEDS, size, digests, kinds).all()
    assert not match_digests(rows, IDS, SEEDS[::-1].copy(), size, digests, kinds).any()
    for place in (0, 127, 128, 1024, size - 1):
        rows[31, place] ^= 0x80
        assert match_digests(rows, IDS, SEEDS, size, digests, kinds).tolist() == [True, True, False, True]
        rows[31, place] ^= 0x80


def test_kinds_may_be_mixed_and_one_of_a_later_version_matches_nothing(layout: BlockLayout, rows: Rows) -> None:
    both = [digests_of(rows, layout.block_bytes, kind) for kind in DigestKind]
    kinds = stored_kinds(np.array([0, 1, 2, 40000], dtype=np.uint16))
    digests = np.array([both[0][0], both[1][1], both[1][2], both[0][3]])
    assert match_digests(rows, IDS, SEEDS, layout.block_bytes, digests, kinds).tolist() == [True, True, False, False]
    nothing = IDS[:0]
    assert match_digests(rows, nothing, SEEDS[:0], layout.block_bytes, digests[:0], kinds[:0]).size == 0


@pytest.mark.parametrize(
    "sizes",
    [
        BlockLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=10, itemsize=4),
        BlockLayout(num_layers=1, block_size=1, num_kv_heads=1, head_dim=3, itemsize=1),
        BlockLayout(num_layers=8, block_size=16, num_kv_heads=8, head_dim=64, itemsize=2),
    ],
    ids=lambda sizes: f"{sizes.block_bytes} bytes",
)
def test_the_digest_of_a_block_is_the_same_wherever_it_lies(sizes: BlockLayout) -> None:
    """A part of the format: the numbers must never change."""
    rows = map_rows(sizes, 32)
    rows[:, : sizes.block_bytes] = np.arange(32 * sizes.block_bytes, dtype=np.uint64).reshape(32, -1) % 251
    rows[5] = rows[7]
    found = digest_slots(torch.from_numpy(rows), IDS, SEEDS, sizes.block_bytes).numpy()
    alone = digest_slots(torch.from_numpy(rows), np.array([5]), SEEDS[:1], sizes.block_bytes).numpy()
    assert found[0] == alone[0]
    assert len(set(found.tolist())) == 4
    known = {1920: 6143716291552128117, 6: 16881902256946446663, 262144: 1699069219490049940}
    assert int(alone[0]) == known[sizes.block_bytes]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_a_device_copies_and_digests_slots_like_the_host(layout: BlockLayout, rows: Rows, device: str) -> None:
    tier = DeviceTier(layout, torch.float32, 32, device)
    staging = tier.new_like(8)
    everything = np.arange(32)
    assert tier.write(everything, rows, everything).all()
    digests = digests_of(rows, layout.block_bytes, DigestKind.LINES)
    assert (tier.digest(IDS, SEEDS) == digests).all()
    assert tier.digest(IDS[:0], SEEDS[:0]).size == 0

    places = np.array([3, 6, 0, 1])
    assert staging.copy_from(places, tier, IDS, after=tier.fences()).all()
    assert (staging.digest(places, SEEDS) == digests).all()
    target = np.array([1, 2, 3, 5])
    assert tier.copy_from(target, staging, places).all()
    back = np.zeros_like(rows)
    assert tier.read(everything, back, everything).all()
    expected = rows.copy()
    expected[target] = rows[IDS]
    assert (back[:, : layout.block_bytes] == expected[:, : layout.block_bytes]).all()
    staging.close()
    tier.close()
