"""The digest kernel in Triton's interpreter gives the CPU's digests, alone and while copying."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.kernels.digest_blocks import digest_blocks_new
from dynamo.kernels.digest_host import block_starts
from dynamo.kernels.layouts import from_paged
from dynamo.tiers.slot_digests import digest_slots

pytest.importorskip("triton", reason="needs Triton")

SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
AXES = ("BLPTHD", "BLPHTD", "LPBTHD", "BLTHPD", "BGLPTHD")


def make_pool(axes, sizes, fill=None):
    """A tensor of random or constant bytes whose axes are named by letters, and its view."""
    shape = [sizes[letter] for letter in axes]
    data = (
        torch.randint(0, 256, shape, dtype=torch.uint8) if fill is None else torch.full(shape, fill, dtype=torch.uint8)
    )
    return data, from_paged(data, axes)


def run(interpreted, src, src_ids, dst, dst_ids, seeds, num_programs):
    from dynamo.kernels import digest_blocks_kernel as module

    out = torch.zeros(src_ids.size, dtype=torch.uint64)
    groups = int(np.lcm(src.head_groups, src.head_groups if dst is None else dst.head_groups))
    src, dst = src.fold_heads(groups), None if dst is None else dst.fold_heads(groups)
    starts = block_starts(src, seeds, src_ids.size)
    for call in module.build_calls(src, src_ids, dst, dst_ids, starts, out):
        if call.num_items:
            interpreted(call.kernel)[(num_programs,)](torch.from_numpy(call.table), *call.arguments, **call.constexprs)
    return out


@SLOW
@given(data=st.data())
def test_kernel_gives_the_digests_of_the_cpu_and_copies(interpreted, data):
    groups = data.draw(st.sampled_from([1, 2]))
    heads = groups * data.draw(st.integers(1, 3))
    sizes = {"B": 4, "L": data.draw(st.integers(1, 2)), "P": data.draw(st.integers(1, 2)), "G": groups}
    sizes |= {"T": data.draw(st.integers(1, 9)), "D": data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 40, 64]))}
    src_axes, dst_axes = data.draw(st.sampled_from(AXES)), data.draw(st.sampled_from(AXES))
    _, src = make_pool(src_axes, sizes | {"H": heads // groups if "G" in src_axes else heads})
    dst_data, dst = make_pool(dst_axes, sizes | {"H": heads // groups if "G" in dst_axes else heads}, fill=255)
    ids = data.draw(st.lists(st.integers(0, 3), max_size=4, unique=True))
    src_ids, dst_ids = np.array(ids, dtype=np.int64), np.array(ids[::-1], dtype=np.int64)
    seeds = np.arange(len(ids), dtype=np.uint64) * np.uint64(977)
    expected = digest_blocks_new(src, src_ids, seeds)

    assert torch.equal(run(interpreted, src, src_ids, None, src_ids, seeds, 2), expected)
    assert torch.equal(run(interpreted, src, src_ids, dst, dst_ids, seeds, 3), expected)
    assert torch.equal(digest_blocks_new(dst, dst_ids, seeds), expected)
    untouched = [b for b in range(4) if b not in ids]
    assert (dst_data.movedim(dst_axes.index("B"), 0)[untouched] == 255).all()


def test_blocks_longer_than_a_tile_and_rows_beside_other_bytes(interpreted):
    data = torch.randint(0, 256, (2, 300, 2, 80), dtype=torch.uint8)
    view = from_paged(data[..., 16:56], "BTHD")
    ids = np.array([1, 0])
    assert torch.equal(run(interpreted, view, ids, None, ids, None, 1), digest_blocks_new(view, ids))


@pytest.mark.parametrize("num_bytes", [1920, 6, 5 * 1024])
def test_slots_of_the_disk_tier_have_the_digests_that_its_index_keeps(interpreted, num_bytes):
    slots = torch.randint(0, 256, (6, 8192), dtype=torch.uint8)
    lines = slots[:, :num_bytes].unflatten(1, (-1, math.gcd(num_bytes, 1024)))
    ids, seeds = np.array([4, 0, 5]), np.array([7, 8, 9], dtype=np.uint64)
    found = run(interpreted, from_paged(lines, "BTD"), ids, None, ids, seeds, 2)
    assert torch.equal(found, digest_slots(slots, ids, seeds, num_bytes))
