"""The rotating kernel in Triton's interpreter gives the CPU's bytes, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.kernels.layouts import from_paged
from dynamo.kernels.rope_shift import Rope, rope_shift
from dynamo.kernels.rope_shift_host import rotations

pytest.importorskip("triton", reason="needs Triton")

SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(interpreted, src, src_ids, dst, dst_ids, deltas, rope, elements, num_programs):
    from dynamo.kernels.rope_shift_kernel import build_call

    groups = int(np.lcm(src.head_groups, dst.head_groups))
    src, dst = src.fold_heads(groups), dst.fold_heads(groups)
    trig, rotation_ids = rotations(rope, deltas)
    call = build_call(src, src_ids, dst, dst_ids, rope, trig, rotation_ids, elements, torch.device("cpu"))
    if call.num_items:
        interpreted(call.kernel)[(num_programs,)](torch.from_numpy(call.table), *call.arguments, **call.constexprs)


@SLOW
@given(data=st.data())
def test_kernel_gives_the_bytes_of_the_cpu(interpreted, data):
    elements = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    half, offset, rest = (
        data.draw(st.integers(1, 9)),
        data.draw(st.sampled_from([0, 3, 16])),
        data.draw(st.integers(0, 5)),
    )
    groups = data.draw(st.sampled_from([1, 2]))
    heads = groups * data.draw(st.integers(1, 2))
    sizes = {
        "B": 4,
        "L": data.draw(st.integers(1, 2)),
        "T": data.draw(st.integers(1, 7)),
        "D": offset + 2 * half + rest,
    }
    src_axes, dst_axes = (data.draw(st.sampled_from(["BLTHD", "BLHTD", "LBTHD", "BGLTHD"])) for _ in range(2))
    src_sizes, dst_sizes = (
        sizes | {"G": groups, "H": heads // groups if "G" in axes else heads} for axes in (src_axes, dst_axes)
    )
    x = torch.randn([src_sizes[a] for a in src_axes]).to(elements)
    expected, found = (torch.full([dst_sizes[a] for a in dst_axes], float("nan"), dtype=elements) for _ in range(2))
    rope = Rope.of_theta(2 * half, 10000.0, interleaved=data.draw(st.booleans()), offset=offset)
    ids = data.draw(st.lists(st.integers(0, 3), max_size=4, unique=True))
    src_ids, dst_ids = np.array(ids, dtype=np.int64), np.array(ids[::-1], dtype=np.int64)
    deltas = np.array([data.draw(st.sampled_from([0, -3, 5000, 1 << 20])) for _ in ids], dtype=np.int64)

    src = from_paged(x, src_axes)
    rope_shift(src, src_ids, from_paged(expected, dst_axes), dst_ids, deltas=deltas, rope=rope, elements=elements)
    run(
        interpreted,
        src,
        src_ids,
        from_paged(found, dst_axes),
        dst_ids,
        deltas,
        rope,
        elements,
        data.draw(st.integers(1, 3)),
    )
    word = {2: torch.int16, 4: torch.int32}[elements.itemsize]
    assert torch.equal(found.view(word), expected.view(word))


def test_blocks_longer_than_a_tile_in_place(interpreted):
    x = torch.randn(2, 200, 1, 128)
    twin, rope, ids = x.clone(), Rope.of_theta(128), np.array([1, 0])
    deltas = np.array([7, -7])
    view, twins = from_paged(x, "BTHD"), from_paged(twin, "BTHD")
    rope_shift(view, ids, view, ids, deltas=deltas, rope=rope, elements=torch.float32)
    run(interpreted, twins, ids, twins, ids, deltas, rope, torch.float32, 1)
    assert torch.equal(x, twin)
