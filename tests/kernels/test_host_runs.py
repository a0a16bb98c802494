"""Long runs of memory: the same bytes at any size and address, and nothing beside them."""

import numpy as np
import pytest

from dynamo.kernels.host_runs import move_run

MIB = 1 << 20
MARGIN = 64


@pytest.mark.parametrize("skipped", [(0, 0), (1, 0), (0, 3), (5, 64)])
@pytest.mark.parametrize(
    "size",
    [0, 1, 4097, 65_536, MIB - 1, MIB, MIB + 1, MIB + 65_535, 2 * MIB + 65_537, 5 * MIB - 4096],
)
def test_bytes_arrive_and_nothing_else_is_written(size: int, skipped: tuple[int, int]) -> None:
    src = np.random.default_rng(size).integers(0, 256, size + 2 * MARGIN, dtype=np.uint8)
    dst = np.full_like(src, 7)
    read, written = (slice(start, start + size) for start in skipped)
    move_run(src[read], dst[written])
    assert np.array_equal(dst[written], src[read])
    assert (dst[: written.start] == 7).all()
    assert (dst[written.stop :] == 7).all()
