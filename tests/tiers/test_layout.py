"""Sizes of the stored form."""

import pytest

from dynamo.tiers.errors import TierConfigError
from dynamo.tiers.layout import BlockLayout


def test_sizes_follow_from_the_shape() -> None:
    layout = BlockLayout(num_layers=32, block_size=16, num_kv_heads=8, head_dim=128, itemsize=2)
    assert layout.token_bytes == 2048
    assert layout.plane_bytes == 32768
    assert layout.block_bytes == layout.slot_bytes == 2 << 20


@pytest.mark.parametrize(("head_dim", "slot_bytes"), [(1, 4096), (64, 4096), (65, 8192), (128, 8192)])
def test_slots_are_whole_pages(head_dim: int, slot_bytes: int) -> None:
    layout = BlockLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=head_dim, itemsize=2)
    assert layout.block_bytes == 64 * head_dim
    assert layout.slot_bytes == slot_bytes


@pytest.mark.parametrize("field", ["num_layers", "block_size", "num_kv_heads", "head_dim", "itemsize"])
def test_sizes_must_be_positive(field: str) -> None:
    sizes = {"num_layers": 1, "block_size": 1, "num_kv_heads": 1, "head_dim": 1, "itemsize": 1, field: 0}
    with pytest.raises(TierConfigError, match=f"{field} is 0"):
        BlockLayout(**sizes)
